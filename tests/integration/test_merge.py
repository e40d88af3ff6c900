"""Real runs merged by the command a person types, reloaded in a process of its own, and verified."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import fine_tune
from fine_tune.cli.merge import main as merge_main
from fine_tune.cli.verify import main as verify_main
from fine_tune.device import plan_device
from fine_tune.errors import CheckpointError
from fine_tune.evaluation_config import check_evaluation
from fine_tune.merging import reload, reloaded
from fine_tune.models.export import carry_template
from fine_tune.passport.document import write_passport
from fine_tune.subjects import Stage, find
from fine_tune.text.conversation import Message

CPU = "accelerator=cpu"


def merge(run: Path, out: Path, *words: str) -> dict[str, Any]:
    assert merge_main([f"ckpt={run}", f"out={out}", CPU, *words]) == 0
    found: dict[str, Any] = json.loads((out / "merge_report.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reload here, where everything is imported; other tests do it in a process of its own."""
    monkeypatch.setattr(
        reloaded,
        "_run",
        lambda place: reload.main(json.loads((place / "question.json").read_text(encoding="utf-8")), place),
    )


def assert_exact(report: dict[str, Any]) -> None:
    own = report["against_base_and_adapter"]
    assert own["max_logit_gap"] <= 1e-4
    assert own["top1_agreement"] == 1.0
    assert own["greedy_equal"]
    assert report["num_prompts"] == 8


def test_the_built_in_run_merges_exactly_and_verifies(
    built_in_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    report = merge(built_in_run, out, "dtype=float32")
    assert_exact(report)
    told = capsys.readouterr().out
    assert "base=bf16, against what was trained: logits" in told
    price = report["bases"]["bf16"]
    assert price["max_logit_gap"] > 0.5
    assert 0 < price["kl"] < 1
    assert report["seconds"] > report["merge_seconds"] > 0
    assert 0.1 < report["peak_rss_gb"] < 8
    # The folder against what training said, and against what it said itself.
    for passport in (built_in_run, out):
        assert verify_main([f"passport={passport}", f"model={out}", CPU]) == 0
        assert capsys.readouterr().out.endswith("the same on 8 prompts\n")
    # What it was trained in, whatever model= says; a typed template overrides it.
    for words, expected in (([], "world"), (["model=llama2_7b"], "world"), (["model.chat_template=guanaco"], "guanaco")):
        model = find([str(out)], check_evaluation(["ckpt=base", *words]))[0].cfg["model"]
        assert (model["path"], model["chat_template"]) == (str(out), expected), words
    # With nothing of ours: the exported template, the exported end of turn, an answer that ends.
    tokenizer = AutoTokenizer.from_pretrained(str(out))
    model: Any = AutoModelForCausalLM.from_pretrained(str(out), dtype=torch.float32)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Add 2 and 5."}], add_generation_prompt=True, return_tensors="pt"
    )
    answer = model.generate(**chat, max_new_tokens=40, do_sample=False)[0, chat["input_ids"].shape[1] :]
    assert int(answer[-1]) == tokenizer.convert_tokens_to_ids("<|end|>")


def test_a_loaded_adapter_says_what_the_trained_one_said(built_in_run: Path, tmp_path: Path) -> None:
    named = find([str(built_in_run)], check_evaluation(["ckpt=base"]))[0]
    subject = Stage(named, plan_device(accelerator="cpu", devices=1, num_nodes=1, precision="32-true")).show(named)
    carry_template(subject.tokenizer, subject.template)
    before = json.loads((built_in_run / "adapter" / "passport.json").read_text(encoding="utf-8"))
    tokens: dict[str, Any] = {"tokenizer": subject.tokenizer, "template": subject.template}
    write_passport(tmp_path, subject.network, **tokens, origin=before["origin"], precision=torch.float32)
    again = json.loads((tmp_path / "passport.json").read_text(encoding="utf-8"))
    assert [p["greedy_ids"] for p in again["prompts"]] == [p["greedy_ids"] for p in before["prompts"]]
    assert (
        again["special_ids"]
        == before["special_ids"]
        == {"bos": 1, "eos": 2, "pad": 0, "end_of_turn": 6, "stop": [2, 6]}
    )
    assert (len(before["prompts"]), before["left_out"]) == (8, {})


@pytest.mark.usefixtures("in_process")
def test_runs_without_quantisation_merge(lora: Path, full: Path, tmp_path: Path) -> None:
    for run, base in ((lora, "bf16"), (full, "all")):
        report = merge(run, tmp_path / run.name, "dtype=float32")
        assert_exact(report)
        assert (report["base"], report["trained_on"]) == (base, base)
    stored = load_file(tmp_path / "full" / "model.safetensors")
    assert all(
        torch.equal(tensor, load_file(full / "adapter" / "model.safetensors")[name]) for name, tensor in stored.items()
    )


@pytest.mark.usefixtures("in_process")
def test_a_merged_folder_is_asked_in_its_own_template(trained: Callable[..., Path], tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(
        "{%- for m in messages -%}[{{ m.role }}] {{ m.content }}{{ end_of_turn }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}[assistant] {% endif -%}\n",
        encoding="utf-8",
    )
    run = trained("own_template", "method=lora", f"model.chat_template={own}")
    out = tmp_path / "merged"
    merge(run, out, "dtype=float32")
    own.unlink()
    asked = [Message("user", "a b"), Message("assistant", "c"), Message("user", "d")]
    defaults = check_evaluation(["ckpt=base"])
    named = find([str(out)], defaults)[0]
    assert named.cfg["model"]["chat_template"] == str(out / "chat_template.jinja")
    plan = plan_device(accelerator="cpu", devices=1, num_nodes=1, precision="32-true")
    template = Stage(named, plan).show(named).template
    assert template.render(asked, True) == "[user] a b</s>[assistant] c</s>[user] d</s>[assistant] "
    assert template.end_of_turn == named.cfg["model"]["end_of_turn"] == "</s>"
    # A template that nobody's passport speaks of is not taken for the one that was trained with.
    (out / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"was changed since passport.json was written"):
        find([str(out)], defaults)
    typed = find([str(out)], check_evaluation(["ckpt=base", "model.chat_template=world"]))[0]
    assert (typed.cfg["model"]["chat_template"], typed.cfg["model"]["end_of_turn"]) == ("world", None)
    (out / "passport.json").unlink()
    assert find([str(out)], defaults)[0].cfg["model"]["chat_template"] == defaults["model"]["chat_template"]


@pytest.mark.usefixtures("in_process")
def test_a_checkpoint_merges_as_its_run_did_at_that_step(nf4: Path, tmp_path: Path) -> None:
    steps = sorted((nf4 / "checkpoints").glob("step-*"))
    report = merge(steps[-1], tmp_path / "last", "dtype=float32")
    assert_exact(report)
    whole = merge(nf4, tmp_path / "run", "dtype=float32")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("last", "run"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert report["num_tensors_compared"] == whole["num_tensors_compared"] == len(theirs)


@pytest.mark.real
@pytest.mark.usefixtures("in_process")
def test_stories260k_merges_exactly(real_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fine_tune.train(
        [
            f"model.path={real_data / 'weights' / 'stories260K'}", "data=instructions", "data.num_eval_items=0",
            f"data.path={real_data / 'instruct' / 'alpaca_en_demo.json'}", "data.max_seq_len=256", "data.max_lost_share=1",
            "data.max_examples=40", "data.max_val_examples=8", "optim.global_batch_size=8",
            "trainer=cpu", "trainer.max_steps=4", "optim.lr=1e-3", "callbacks.preview=null", f"run_dir={run}",
            f"data.cache_dir={tmp_path / 'cache'}",
        ]
    )  # fmt: skip
    report = merge(run, tmp_path / "merged", "dtype=float32")
    assert_exact(report)
    assert report["tied_embeddings"]
    assert report["bases"]["bf16"]["max_logit_gap"] > 0.1


def test_wrong_words_are_told_before_torch_is_imported(tmp_path: Path) -> None:
    words = ["ckpt=runs/x", "dtpye=float32", "base=nf5", "shard_gb=0", "model.pth=x"]
    code = (
        "import sys; from fine_tune.cli.main import main\n"
        f"code = main(['merge', *{words!r}]); print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "2 False"
    for part in ("Did you mean dtype=?", "choose one of nf4, fp4, int8, bf16", "must be a number above 0"):
        assert part in done.stderr


def test_help_is_there_for_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    from fine_tune.cli.main import main

    for verb in ("merge", "verify", "push"):
        assert main([verb, "--help"]) == 0
        assert f"usage: fine-tune {verb}" in capsys.readouterr().out


def test_what_is_no_checkpoint_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge_main([f"ckpt={tmp_path}", CPU]) == 4
    assert "neither a run, a checkpoint of one" in capsys.readouterr().err
