"""The words of a drill, its own and those of its runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fine_tune.cli.drill import main
from fine_tune.config import check_config
from fine_tune.drills.words import run_words

USERS = [
    "trainer.max_epochs=3", "run_name=mine", "optim.lr=1e-4", "callbacks.preview.num_prompts=2", "+logger=csv",
    "callbacks.checkpoint.every_n_steps=50", "callbacks.checkpoint.keep=5", "data.num_eval_items=9", "overwrite=true",
]  # fmt: skip


def made(words: list[str]) -> tuple[list[str], dict[str, dict[str, object]]]:
    cfg = check_config(words).cfg
    found = run_words(words, cfg, steps=6, save_every=2)
    return found, check_config([*found, "run_dir=x"]).cfg


def test_a_runs_words_are_the_users_but_short_and_silent() -> None:
    words, cfg = made(USERS)
    assert words[:2] == ["optim.lr=1e-4", "callbacks.checkpoint.keep=5"]
    assert cfg["optim"]["lr"] == 1e-4
    assert (cfg["trainer"]["max_steps"], cfg["trainer"]["max_epochs"]) == (6, None)
    assert cfg["logger"] == {}
    assert "preview" not in cfg["callbacks"]
    assert cfg["callbacks"]["checkpoint"] == {**cfg["callbacks"]["checkpoint"], "every_n_steps": 2, "keep": 5}
    assert (cfg["data"]["num_eval_items"], cfg["data"]["max_val_examples"]) == (0, 16)


@pytest.mark.parametrize("more", [["callbacks=none"], ["objective=dpo"], ["data.max_val_examples=3"], ["callbacks=early_stopping",
                                  "trainer.val_every_n_steps=50"]])  # fmt: skip
def test_every_kind_of_run_can_be_drilled(more: list[str]) -> None:
    _, cfg = made(more)
    assert cfg["callbacks"]["checkpoint"]["every_n_steps"] == 2  # type: ignore[index]
    assert cfg["data"]["max_val_examples"] == (3 if "data.max_val_examples=3" in more else 16)
    assert ("early_stopping" in cfg["callbacks"]) == ("callbacks=early_stopping" in more)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["resum"], "resum: no such drill. Did you mean resume?"),
        (["x"], "Choose from resume, equivalence."),
        (["resume", "steps=2"], "steps=2: must be a whole number of at least 3."),
        (["resume", "steps=many"], "must be a whole number"),
        (["resume", "optim.lrr=1"], "optim.lrr: unknown key. Did you mean optim.lr?"),
        (["equivalence", "float64=maybe"], "float64=maybe: must be true or false."),
        (["resume", "float64=true"], "float64: unknown key."),
        (["equivalence", "trainer.devices=2", "trainer.strategy=ddp"], "starts its two processes itself"),
        (
            ["resume", "trainer.num_nodes=2", "trainer.strategy=ddp", "trainer.micro_batch_tokens=4096"],
            "a drill stays on one machine",
        ),
    ],
)  # fmt: skip
def test_wrong_words_end_before_anything_starts(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_drill_inside_torchrun_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    assert main(["resume"]) == 2
    assert "Run it without torchrun" in capsys.readouterr().err


def test_a_folder_that_holds_something_is_left_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert main(["resume", "run_dir=mine"]) == 2
    assert "run_dir=mine: is there already" in capsys.readouterr().err
    assert [item.name for item in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_wrong_words_are_told_before_torch_is_imported() -> None:
    code = (
        "import sys; from fine_tune.cli.main import main\n"
        "code = main(['drill', 'resume', 'steps=0', 'optim.lrr=1']); print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "2 False"
    assert "2 problem(s)" in done.stderr
