"""A data worker that is killed ends the run soon; its last checkpoint is whole, and the resumed run is the clean one."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

import fine_tune
from fine_tune import checkpoints
from fine_tune.errors import EnvironmentProblem
from fine_tune.modules.step import StepModule
from fine_tune.packing.batches import StepBatch

from .conftest import assert_same_end, read_metrics, small_job

KILLED_AT = 4


@pytest.mark.drill
def test_a_killed_worker_loses_no_step_that_was_saved(
    stand_in: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, run_dir = tmp_path / "clean" / "run", tmp_path / "killed" / "run"
    fine_tune.train(small_job(stand_in, clean, "trainer.num_workers=2"))
    train_step, killed = StepModule.training_step, []

    def killing(self: StepModule, batch: StepBatch, batch_idx: int) -> None:
        if batch.step == KILLED_AT - 1:
            # Those of the training rows, and those that wait for the next validation.
            for worker in multiprocessing.active_children():
                os.kill(worker.pid or 0, signal.SIGKILL)
                killed.append(time.monotonic())
        train_step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(StepModule, "training_step", killing)
        with pytest.raises(EnvironmentProblem, match=r"trainer\.num_workers=2: a process that builds batches has died") as told:
            fine_tune.train(small_job(stand_in, run_dir, "trainer.num_workers=2"))
    assert len(killed) >= 2
    assert time.monotonic() - killed[0] < 60
    assert told.value.exit_code == 5
    assert not (run_dir / "summary.json").exists()
    newest, damaged = checkpoints.latest(run_dir / "checkpoints")
    assert damaged == []
    # Steps whose batches were there already may still have been done and saved.
    assert newest is not None
    assert KILLED_AT - 1 <= newest.step < 9
    fine_tune.train([f"resume={run_dir}"])
    assert_same_end(clean, run_dir, step=9)


def test_a_death_in_the_middle_of_a_step_is_told_in_a_sentence_as_well(
    stand_in: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch says so from a signal handler, wherever the main thread is; benchmarks/faults kills for real."""
    train_step = StepModule.training_step

    def dying(self: StepModule, batch: StepBatch, batch_idx: int) -> None:
        if batch.step == KILLED_AT - 1:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
        train_step(self, batch, batch_idx)

    run_dir = tmp_path / "run"
    monkeypatch.setattr(StepModule, "training_step", dying)
    with pytest.raises(EnvironmentProblem, match=r"trainer\.num_workers=1: a process that builds batches has died") as told:
        fine_tune.train(small_job(stand_in, run_dir, "trainer.num_workers=1"))
    assert told.value.exit_code == 5
    assert json.loads((run_dir / "failure.json").read_text(encoding="utf-8"))["exit_code"] == 5
    assert read_metrics(run_dir)[-1]["step"] == KILLED_AT - 1
