"""A data worker that dies in the middle of a step: torch says so from a signal handler, wherever the main thread is."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import pytest

import fine_tune
from fine_tune.errors import EnvironmentProblem
from fine_tune.modules.step import StepModule
from fine_tune.packing.batches import StepBatch

from .conftest import read_metrics, small_job


def test_it_ends_the_run_in_a_sentence_and_the_run_goes_on(
    stand_in: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step = StepModule.training_step

    def killing(self: StepModule, batch: StepBatch, batch_idx: int) -> None:
        if batch.step == 3:
            workers = multiprocessing.active_children()
            assert workers
            workers[0].kill()
            time.sleep(60)
        train_step(self, batch, batch_idx)

    run_dir = tmp_path / "run"
    started = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(StepModule, "training_step", killing)
        with pytest.raises(EnvironmentProblem, match=r"trainer\.num_workers=1: a process that builds batches has died") as told:
            fine_tune.train(small_job(stand_in, run_dir, "trainer.num_workers=1"))
    assert time.monotonic() - started < 55, "the step was left at once"
    assert told.value.exit_code == 5
    assert "resume=" in str(told.value)
    assert json.loads((run_dir / "failure.json").read_text(encoding="utf-8"))["exit_code"] == 5
    assert read_metrics(run_dir)[-1]["step"] == 3
    fine_tune.train([f"resume={run_dir}"])
    assert read_metrics(run_dir)[-1]["step"] == 9
