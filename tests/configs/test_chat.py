"""The words of chat: every mistake is told at once, with torch not imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fine_tune.chat_config import ChatConfig, check_chat
from fine_tune.errors import ConfigError


def test_the_defaults_pass_and_are_the_schema() -> None:
    cfg = check_chat(["ckpt=runs/sft"])
    assert cfg["ckpt"] == ["runs/sft"]
    assert set(cfg) == {*ChatConfig.model_fields, "model_is_default", "typed_text"}
    assert (cfg["temperature"], cfg["system"], cfg["save"], cfg["model_is_default"]) == (0.0, None, None, True)


def test_words_are_taken() -> None:
    words = [
        "ckpt=[base,runs/sft]",
        "save=p.jsonl",
        "system='Be brief: now, please.'",
        "temperature=0.7",
        "model=smollm2_135m",
    ]
    cfg = check_chat(words)
    assert cfg["ckpt"] == ["base", "runs/sft"]
    assert (cfg["save"], cfg["system"], cfg["temperature"]) == ("p.jsonl", "Be brief: now, please.", 0.7)
    assert (cfg["model"]["name"], cfg["model_is_default"]) == ("smollm2_135m", False)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], ["ckpt: no value. Pass ckpt=<run, checkpoint, adapter, model or base>, or two of them such as ckpt=[base,runs/sft]."]),
        (["ckpt=[a,b,c]"], ["ckpt = ['a', 'b', 'c']: must be one or two checkpoints: more do not stand side by side."]),
        (["ckpt=[a,a]"], ["ckpt = ['a', 'a']: names the same checkpoint twice."]),
        (["ckpt=a", "save=p.jsonl"], ["save = p.jsonl: one checkpoint gives no pairs. Pass two, such as ckpt=[base,runs/sft]"]),
        (
            ["ckpt=a", "temprature=1", "top_p=0", "max_new_tokens=0", "precision=bf16", "eval=mmlu"],
            [
                "temprature: unknown key. Did you mean temperature?",
                "top_p = 0: must be > 0.",
                "max_new_tokens = 0: must be >= 1.",
                "precision = bf16: must be one of auto, 32-true, bf16-mixed, 16-mixed. Did you mean bf16-mixed?",
                "eval: unknown key.",
            ],
        ),
    ],
)  # fmt: skip
def test_every_mistake_is_told(words: list[str], told: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        check_chat(words)
    assert len(refused.value.problems) == len(told)
    for sentence in told:
        assert sentence in str(refused.value)


def test_mistakes_are_told_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "notes.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    code = (
        "import sys\nfrom fine_tune.cli.main import main\ncodes = [main(['chat', *words]) for words in "
        f"(['ckpt=a', 'top_p=2'], ['ckpt=[a,b]', 'save={tmp_path}/notes.jsonl'], [], ['--help'])]\n"
        "print(codes, [m for m in ('torch', 'lightning', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[2, 2, 2, 0] []"
    assert "top_p = 2: must be <= 1." in done.stderr
    assert "notes.jsonl: its rows are no pairs (line 1 has no chosen). Pass another file." in done.stderr
    assert "usage: fine-tune chat ckpt=<checkpoint>" in done.stderr
