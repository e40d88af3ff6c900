"""Memory that runs out in a step costs time and not the run: the step is done again in halves, with the same result."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fine_tune
from fine_tune.cli.train import main
from fine_tune.errors import MemoryExhausted
from fine_tune.modules.dpo import DPOModule
from fine_tune.modules.sft import SFTModule
from fine_tune.modules.step import StepModule

from .conftest import read_metrics, small_job, small_pairs_job


def running_out(kind: type[StepModule], monkeypatch: pytest.MonkeyPatch, *, above: int, after: bool = True) -> list[int]:
    """Let every micro-batch of more than ``above`` tokens fail from step 2 on; returns what was tried.

    With ``after`` it fails after the forward and backward pass of the micro-batch before it, as it does on a device.
    """
    loss, tried = kind.micro_loss, []

    def failing(self: StepModule, micro: Any, batch: Any, ratios: Any) -> torch.Tensor:
        tried.append(micro.num_tokens)
        found = loss(self, micro, batch, ratios) if after else None
        if micro.num_tokens > above and self.step >= 1:
            if found is not None:
                found.backward()  # half done: its gradients are there, and must be taken back
            raise torch.OutOfMemoryError("planted")
        return loss(self, micro, batch, ratios) if found is None else found

    monkeypatch.setattr(kind, "micro_loss", failing)
    return tried


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]


@pytest.mark.parametrize("pairs", [False, True])
def test_the_step_is_done_again_in_halves_with_the_same_result(
    pairs: bool,
    stand_in: tuple[Path, Path],
    pair_stand_in: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job: Callable[..., list[str]] = small_pairs_job if pairs else small_job
    data = pair_stand_in if pairs else stand_in
    words = ["method.dropout=0.0", "trainer.max_steps=4", "trainer.micro_batch_tokens=400", "callbacks.preview=null"]
    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    fine_tune.train(job(data, calm, *words))
    with monkeypatch.context() as patch:
        tried = running_out(DPOModule if pairs else SFTModule, patch, above=60)
        with pytest.warns(UserWarning, match="done again with at most"):
            summary = fine_tune.train(job(data, stormy, *words))
    assert summary["micro_batch_halvings"] >= 1
    assert max(tried) > 60
    for one, other in zip(read_metrics(calm), read_metrics(stormy), strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if isinstance(value, float):
                assert math.isclose(value, other[key], rel_tol=2e-4, abs_tol=2e-6), (key, value, other[key])
            else:
                assert value == other[key], key


def test_what_a_failed_attempt_left_behind_would_be_seen(
    stand_in: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: gradients of the failed attempt that stay are a different run."""
    words = ["method.dropout=0.0", "trainer.max_steps=4", "trainer.micro_batch_tokens=400", "callbacks.preview=null"]
    fine_tune.train(small_job(stand_in, tmp_path / "calm", *words))
    from fine_tune.modules.replay import Replay

    run = Replay.run

    def careless(self: Replay, micros: Any, *, begin: Any, **rest: Any) -> None:
        begun: list[int] = []

        def once() -> None:
            if not begun:
                begin()
            begun.append(1)

        run(self, micros, begin=once, **rest)

    monkeypatch.setattr(Replay, "run", careless)
    running_out(SFTModule, monkeypatch, above=60)
    with pytest.warns(UserWarning, match="done again"):
        fine_tune.train(small_job(stand_in, tmp_path / "stormy", *words))
    gaps = [abs(a - b) for a, b in zip(losses(tmp_path / "calm"), losses(tmp_path / "stormy"), strict=True)]
    assert max(gaps) > 1e-3


def test_dropout_is_drawn_as_if_the_first_attempt_had_not_been(
    stand_in: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that runs out in its second step, and one that has room for no more from its second step on, draw alike."""
    words = ["method.dropout=0.2", "trainer.max_steps=4", "trainer.micro_batch_tokens=400", "callbacks.preview=null"]
    ends = []
    for name, after in (("late", True), ("early", False)):
        with monkeypatch.context() as patch:
            running_out(SFTModule, patch, above=60, after=after)
            with pytest.warns(UserWarning, match="done again"):
                fine_tune.train(small_job(stand_in, tmp_path / name, *words))
        ends.append(losses(tmp_path / name))
    assert ends[0] == ends[1]


def test_a_single_row_that_does_not_fit_ends_the_run_with_what_to_change(
    stand_in: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 0)
    running_out(SFTModule, monkeypatch, above=5)
    run = tmp_path / "run"
    with pytest.warns(UserWarning, match="done again"):
        assert main(small_job(stand_in, run, "trainer.micro_batch_tokens=400")) == MemoryExhausted.exit_code
    said = capsys.readouterr().err
    assert "trainer.micro_batch_tokens" in said
    assert "data.max_seq_len" in said
    assert "trainer.speed=lean" in said
    # The first step was fine, and is saved.
    assert (run / "checkpoints" / "step-0000001").is_dir()
    assert json.loads((run / "failure.json").read_text())["exit_code"] == 7
