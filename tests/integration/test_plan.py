"""`fine-tune plan` on the built-in world: what a run would choose, what a card would hold, and a rehearsal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fine_tune import memory_plan, planning
from fine_tune.cli.plan import main
from fine_tune.memory.shape import UnknownShape

pytestmark = pytest.mark.timeout(240)


def planned(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    assert main([*words, "json=true"]) == code
    text = capsys.readouterr().out
    return dict(json.loads(text[text.index("{\n") :]))


def test_a_plan_of_the_built_in_job_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "trainer=cpu")
    assert found["chosen"]["speed"] == "plain"
    # The recipe of the built-in model sets 2,048.
    assert found["chosen"]["tokens"] == 2048
    step, tokens = found["fullest"]
    assert 0 <= step < 200
    assert 0 < tokens <= 2048
    assert found["speeds"] == {}
    assert all(size > 0 for size in found["peak"].values())


def test_a_card_that_is_not_here_is_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["trainer.micro_batch_tokens=auto", "optim.global_batch_size=512"]
    large = planned(capsys, *words, "card_gb=80")
    assert (large["chosen"]["speed"], large["chosen"]["tokens"]) == ("balanced", 8192)
    assert set(large["speeds"]) == {"plain", "fast", "balanced", "lean"}
    small = planned(capsys, *words, "card_gb=0.1")
    tokens = {name: one[0] for name, one in small["speeds"].items()}
    assert tokens["plain"] <= tokens["fast"] < tokens["balanced"] < tokens["lean"]
    assert sum(small["peak"].values()) <= 0.92 * 0.1e9


def test_what_does_not_fit_has_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "card_gb=0.001", code=7)
    assert found["chosen"]["speed"] == "lean"


def test_a_model_without_an_estimate_says_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(folder: Path, *, trust_remote_code: bool = False) -> Any:
        raise UnknownShape("it has \x1b[31mexperts")

    monkeypatch.setattr(planning, "read_shape", unknown)
    monkeypatch.setattr(memory_plan, "read_shape", unknown)
    assert main(["card_gb=24"]) == 0
    assert r"no estimate for this model (it has \x1b[31mexperts)" in " ".join(capsys.readouterr().out.split())
    found = planned(capsys, "card_gb=24")
    assert (found["peak"], found["speeds"]) == (None, {})
    assert found["unknown"] == found["chosen"]["unknown"] == "it has \x1b[31mexperts"
    assert planned(capsys, "trainer=cpu")["chosen"]["unknown"] is None


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_a_rehearsal_runs_the_fullest_step(capsys: pytest.CaptureFixture[str], objective: str) -> None:
    assert main([f"objective={objective}", "trainer=cpu", "rehearse=true"]) == 0
    text = capsys.readouterr().out
    assert "rehearsal: the fullest step took" in text
    assert "what trains: weights, gradients" in text


def test_mistakes_are_told_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card_gb=-1", "rehearse=maybe", "optim.lrr=1"]) == 2
    told = capsys.readouterr().err
    assert "card_gb=-1: must be a number above 0" in told
    assert "rehearse=maybe: must be true or false" in told
    assert "Did you mean optim.lr" in told
    assert main(["card_gb=24", "rehearse=true", "optim.lrr=1"]) == 2
    told = capsys.readouterr().err
    assert "2 problem(s)" in told
    assert "Leave card_gb out" in told


def test_a_run_keeps_what_was_settled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    import fine_tune

    words = [
        "trainer=cpu", "trainer.max_steps=1", "trainer.micro_batch_tokens=auto", "callbacks.preview=null",
        "optim.global_batch_size=8", "data.max_examples=100", "data.max_val_examples=8",
    ]  # fmt: skip
    fine_tune.train([*words, "data.num_eval_items=0", f"run_dir={tmp_path / 'run'}"])
    trainer = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))["trainer"]
    assert (trainer["speed"], trainer["micro_batch_tokens"]) == ("plain", 4096)
