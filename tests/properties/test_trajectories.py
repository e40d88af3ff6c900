"""N31: fifty steps of SFT and of DPO are what they were when they were recorded.

Loss and gradient norm of each step are kept in trajectories/ with the environment that they are from. In that environment
the last digits must agree. Elsewhere sums are rounded otherwise, and fifty updates carry that on: with other instructions
(``ATEN_CPU_CAPABILITY=default`` for both, ``MKL_CBWR=COMPATIBLE`` for SFT) the curves were at most 2e-5 apart and 4e-6 in the
mean. By default the first ten steps are run, as a drill all of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fine_tune.modules.sft import SFTModule

from .judging import FACTOR
from .trajectory import CURVES, FOLDER, LENGTH, OBJECTIVES, curves_of, job, lines_of, stamp

EARLY = 10


class Bound(NamedTuple):
    """Most that any step may be off, relative where a number is larger than 1, and that all are off in the mean."""

    largest: float
    mean: float


SAME, ELSEWHERE = Bound(1e-6, 1e-8), Bound(1e-4, 2e-5)
Curves = dict[str, list[float]]


def recorded(objective: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{objective}.json").read_text(encoding="utf-8"))
    return found


def bound_here(objective: str) -> Bound:
    return SAME if recorded(objective)["environment"] == stamp() else ELSEWHERE


def residuals(found: list[float], kept: list[float]) -> Bound:
    apart = [(a - b) / max(1.0, abs(b)) for a, b in zip(found, kept[: len(found)], strict=True)]
    return Bound(max(map(abs, apart)), abs(sum(apart)) / len(apart))


def close(objective: str, found: Curves) -> None:
    bound = bound_here(objective)
    for name in CURVES:
        off = residuals(found[name], recorded(objective)[name])
        assert off.largest <= bound.largest, f"{objective} {name} is off by {off} (allowed {bound})"
        assert off.mean <= bound.mean, f"{objective} {name} is off by {off} (allowed {bound})"


def early(objective: str, root: Path, *more: str, steps: int = EARLY) -> Curves:
    return curves_of(lines_of(job(objective, root / "run", root / "cache", *more), steps=steps))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_n31_ten_steps_are_those_that_were_recorded(objective: str, tmp_path: Path) -> None:
    found = early(objective, tmp_path)
    assert {len(curve) for curve in found.values()} == {EARLY}
    close(objective, found)


@pytest.mark.drill
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_n31_fifty_steps_are_those_that_were_recorded(objective: str, tmp_path: Path) -> None:
    found = curves_of(lines_of(job(objective, tmp_path / "run", tmp_path / "cache")))
    assert {len(curve) for curve in found.values()} == {LENGTH}
    close(objective, found)


def missed(objective: str, found: Curves) -> None:
    """A control: a hundred tolerances away where the environment is the same, and outside the bound of any other."""
    for name in CURVES:
        off = residuals(found[name], recorded(objective)[name])
        print(f"control: {objective} {name} is off by {off.largest:.3g}, in the mean by {off.mean:.3g}")
        assert off.largest >= FACTOR * SAME.largest
        assert off.mean >= FACTOR * SAME.mean
        assert off.largest > ELSEWHERE.largest or off.mean > ELSEWHERE.mean


def test_n31_control_a_rate_one_percent_off(tmp_path: Path) -> None:
    missed("sft", early("sft", tmp_path, "optim.lr=1.01e-3", steps=6))


@pytest.mark.drill
def test_n31_control_a_mean_of_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = SFTModule.micro_loss

    def mean(self: SFTModule, micro: Any, batch: Any, ratios: Any) -> torch.Tensor:
        own = batch.num_supervised / (len(micro.rows) * len(batch.micro_batches))
        return right(self, micro, batch, ratios) * own

    monkeypatch.setattr(SFTModule, "micro_loss", mean)
    missed("sft", early("sft", tmp_path, steps=6))


def test_n31_control_a_beta_one_percent_off(tmp_path: Path) -> None:
    missed("dpo", early("dpo", tmp_path, "objective.beta=0.303", steps=6))


def test_each_record_says_what_it_is_from_and_why() -> None:
    for objective in OBJECTIVES:
        record = recorded(objective)
        assert len(record["reason"]) >= 10
        assert record["environment"].keys() == stamp().keys()
        assert [len(record[name]) for name in CURVES] == [LENGTH, LENGTH]
