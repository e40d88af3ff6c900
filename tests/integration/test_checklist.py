"""The checklist as part of a run: it changes nothing, is printed and kept, and stops a run in which something is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fine_tune
from fine_tune import runs
from fine_tune.checklist.first_steps import FILE
from fine_tune.cli.train import main
from fine_tune.modules.step import StepModule

from .conftest import UNCHECKED, assert_same, assert_same_end
from .conftest import small_job as unchecked_job
from .conftest import small_pairs_job as unchecked_pairs_job

SHORT = ["trainer.max_steps=3", "callbacks.preview.every_n_steps=3"]
BEFORE, AFTER = ["adapter", "masks", "division", "memory"], ["gradients", "updates", "base"]


def small_job(stand_in: tuple[Path, Path], run_dir: Path, *more: str) -> list[str]:
    return [word for word in unchecked_job(stand_in, run_dir) if word != UNCHECKED] + list(more)


def small_pairs_job(stand_in: tuple[Path, Path], run_dir: Path, *more: str) -> list[str]:
    return [word for word in unchecked_pairs_job(stand_in, run_dir) if word != UNCHECKED] + list(more)


def items(run_dir: Path) -> dict[str, dict[str, Any]]:
    found = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
    assert found["seconds"] < 60
    return {item["name"]: item for item in found["items"]}


def test_a_run_with_it_is_the_run_without(
    stand_in: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fine_tune.train(small_job(stand_in, tmp_path / "with", *SHORT))
    told = capsys.readouterr().out
    fine_tune.train(small_job(stand_in, tmp_path / "without", *SHORT, UNCHECKED))
    assert_same_end(tmp_path / "with", tmp_path / "without", step=3)
    assert not (tmp_path / "without" / FILE).exists()
    assert list(items(tmp_path / "with")) == [*BEFORE, *AFTER]
    assert {item["passed"] for name, item in items(tmp_path / "with").items() if name != "memory"} == {True}
    for part in ("checklist, before the first step", "checklist, after 2 updates"):
        assert part in told


def test_a_preference_run_shows_where_it_starts(pair_stand_in: tuple[Path, Path], sft_run: Path, tmp_path: Path) -> None:
    fine_tune.train(small_pairs_job(pair_stand_in, tmp_path / "run", *SHORT, f"init_from={sft_run}"))
    found = items(tmp_path / "run")
    assert list(found) == [*BEFORE, "reference", *AFTER]
    assert f"losses within 0.0e+00 of {math.log(2):.6f}" in found["reference"]["says"]
    assert "on it moves log-probabilities by up to" in found["adapter"]["says"]
    assert "A wait" not in found["gradients"]["says"], "B is not zero, so every A must have a gradient"


def test_a_resumed_run_is_checked_again(stand_in: tuple[Path, Path], tmp_path: Path) -> None:
    fine_tune.train(small_job(stand_in, tmp_path / "run", "trainer.max_steps=2", "callbacks.preview=null"))
    first = items(tmp_path / "run")
    assert list(first) == [*BEFORE, "gradients", "base"], "a warm-up step moves nothing, and one update no A"
    fine_tune.train([f"resume={tmp_path / 'run'}", "trainer.max_steps=5"])
    again = items(tmp_path / "run")
    assert list(again) == [*BEFORE, *AFTER]
    assert "28 of 28 trained tensors have a gradient" in again["gradients"]["says"]


def untouched_a(network: nn.Module) -> None:
    """The bug: an A that the optimizer was told to leave alone keeps its gradient to itself."""
    parameter = next(p for name, p in network.named_parameters() if "lora_A" in name)

    def forget(p: torch.Tensor) -> None:
        assert p.grad is not None
        p.grad.zero_()

    parameter.register_post_accumulate_grad_hook(forget)


def moved_base(network: nn.Module) -> None:
    """The bug: something writes into the base, at the last bit."""
    norm = next(p for name, p in network.named_parameters() if "input_layernorm" in name)
    parameter = next(p for name, p in network.named_parameters() if "lora_B" in name)

    def write(p: torch.Tensor) -> None:
        norm.data.copy_(torch.nextafter(norm.data, torch.full_like(norm, 2.0)))

    parameter.register_post_accumulate_grad_hook(write)


@pytest.mark.parametrize(("bug", "says"), [(untouched_a, "gradients: 27 of 28"), (moved_base, "base: 1 of")])
def test_a_bug_stops_the_run_before_anything_is_saved(
    stand_in: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    bug: Any,
    says: str,
) -> None:
    def planted(network: nn.Module, execution: Any) -> None:
        bug(network)

    monkeypatch.setattr(runs, "prepare_layers", planted)
    words = small_job(stand_in, tmp_path / "run", *SHORT, "callbacks.checkpoint.every_n_steps=3", "method.dropout=0.0")
    assert main(words) == 2
    told = capsys.readouterr().err
    assert says in told
    assert "trainer.checklist=false" in told
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
    assert main([*words, UNCHECKED, "overwrite=true"]) == 0


def test_a_wrong_denominator_stops_the_run_before_the_first_step(
    stand_in: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fine_tune.modules import sft

    right = sft.sft_loss
    monkeypatch.setattr(sft, "sft_loss", lambda logps, num_step_tokens: right(logps, num_step_tokens=logps.numel()))
    steps: list[int] = []
    monkeypatch.setattr(StepModule, "_update", lambda self, batch, ratios: steps.append(batch.step))
    assert main(small_job(stand_in, tmp_path / "run", *SHORT)) == 2
    assert "division: " in capsys.readouterr().err
    assert steps == []


def test_nothing_is_drawn_from_the_random_states(
    stand_in: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen where dropout draws its first numbers."""
    states: list[torch.Tensor] = []
    step = StepModule.training_step

    def noting(self: StepModule, batch: Any, batch_idx: int) -> None:
        states.append(torch.get_rng_state())
        step(self, batch, batch_idx)

    monkeypatch.setattr(StepModule, "training_step", noting)
    for name, more in (("a", []), ("b", [UNCHECKED])):
        fine_tune.train(small_job(stand_in, tmp_path / name, "trainer.max_steps=1", "callbacks.preview=null", *more))
    assert_same(states[0], states[1])
