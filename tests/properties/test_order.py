"""N27 and N28: a run is what its seed says, and each epoch shows every sample once, whoever works on it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fine_tune.losses.sft import sft_loss
from fine_tune.models.forward import supervised_logps
from fine_tune.packing.batches import pack
from fine_tune.packing.plan import Planner

from .drawn import LENGTHS, TOLERANCE, Row, plain, rows_of
from .judging import Step, exceeds, same, step
from .trajectory import job, lines_of, read_lines

STEPS = 2


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """The first lines of metrics.jsonl of a run, without what a clock decides; each run once."""
    root = tmp_path_factory.mktemp("order")
    known: dict[tuple[str, ...], list[str]] = {}

    def start(*more: str, again: bool = False) -> list[str]:
        key = (*more, str(again))
        if key not in known:
            lines = lines_of(job("sft", root / str(len(known)), root / "cache", *more), steps=STEPS)
            known[key] = [json.dumps(line, sort_keys=True) for line in lines]
        return known[key]

    return start


def test_n27_the_same_seed_is_the_same_run_whoever_builds_its_batches(started: Callable[..., list[str]]) -> None:
    """Loss and gradient norm of each step, validation and counts: byte for byte."""
    first = started()
    assert len(first) == STEPS + 1
    assert started("trainer.num_workers=2", again=True) == first


def test_n27_control_another_seed(started: Callable[..., list[str]]) -> None:
    def curves(lines: list[str]) -> Step:
        found = [json.loads(line) for line in lines[1:]]
        return Step(*(torch.tensor([line[key] for line in found]).double() for key in ("train/loss", "grad_norm")))

    exceeds(curves(started("seed=43")), curves(started()), 1e-6)


def dealt(planner: Planner, epoch: int) -> list[list[tuple[int, ...]]]:
    """Micro-batches of each rank, over a whole epoch."""
    steps = [planner.step(epoch * planner.steps_per_epoch + k) for k in range(planner.steps_per_epoch)]
    return [[m for plan in steps for m in plan.micro_batches[rank]] for rank in range(planner.num_ranks)]


def summed(network: nn.Module, rows: list[Row], shares: list[list[tuple[int, ...]]]) -> Step:
    """What an epoch's micro-batches of all ranks add up to at one place of the weights."""
    total = sum(int(mask.sum()) for _, mask in rows)
    micros = [pack([rows[i] for i in members]) for share in shares for members in share]
    losses = [lambda m=m: sft_loss(supervised_logps(network, m), num_step_tokens=total) for m in micros]
    return step(network, lambda: torch.stack([loss() for loss in losses]).sum())


@plain(6)
@given(
    lengths=LENGTHS, batch=st.integers(1, 4), ranks=st.integers(1, 3), capacity=st.integers(14, 40), epoch=st.integers(0, 3)
)  # fmt: skip
def test_n28_an_epoch_is_every_row_once_and_its_gradient_that_of_all_rows(
    exact_norm: None, network: nn.Module, lengths: list[int], batch: int, ranks: int, capacity: int, epoch: int
) -> None:
    rows = rows_of(lengths)
    shares = dealt(Planner(lengths, 7, batch, capacity, ranks), epoch)
    seen = Counter(i for share in shares for members in share for i in members)
    assert seen == Counter(range(len(rows))), "disjoint, and together everything"
    same(summed(network, rows, shares), summed(network, rows, [[tuple(range(len(rows)))]]), TOLERANCE)


def test_n28_each_epoch_has_an_order_of_its_own() -> None:
    planner = Planner([5] * 40, 7, 4, 64)
    orders = {tuple(planner.order(epoch).tolist()) for epoch in range(6)}
    assert len(orders) == 6
    assert all(sorted(order) == list(range(40)) for order in orders)


def test_n28_control_samples_drawn_with_replacement(exact_norm: None, network: nn.Module) -> None:
    class Drawing(Planner):
        def order(self, epoch: int) -> np.ndarray:
            return np.random.default_rng([self.seed, epoch]).integers(0, len(self.lengths), len(self.lengths))

    lengths = [5, 9, 3, 7, 4, 6]
    shares = dealt(Drawing(lengths, 7, 2, 40, 2), 0)
    seen = Counter(i for share in shares for members in share for i in members)
    assert seen != Counter(range(6))
    rows = rows_of(lengths)
    exceeds(summed(network, rows, shares), summed(network, rows, [[tuple(range(6))]]), TOLERANCE)


def test_n28_control_two_ranks_that_both_take_everything(exact_norm: None, network: nn.Module) -> None:
    lengths = [5, 9, 3, 7]
    rows, (share,) = rows_of(lengths), dealt(Planner(lengths, 7, 2, 40, 1), 0)
    right: Any = summed(network, rows, [share])
    exceeds(summed(network, rows, [share, share]), right, TOLERANCE)


def test_the_lines_hold_no_clock(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.5, "step_seconds": 0.1, "mfu": null}\n')
    assert read_lines(tmp_path) == [{"step": 1, "train/loss": 2.5}]
