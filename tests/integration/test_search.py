"""A search with Optuna: trials are jobs, poor ones stop early, and a killed search goes on."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import optuna
import pytest

import fine_tune
from fine_tune.cli.train import main
from fine_tune.modules.step import StepModule

from .conftest import read_metrics
from .test_sweep import nothing_kept, records, words_of  # noqa: F401 - a fixture for every test


def search(stand_in: tuple[Path, Path], root: Path, *more: str) -> list[str]:
    return words_of(
        stand_in, root, "sweep=optuna", "optim.lr=tag(log,interval(1e-6,3e-2))", "method.rank=2,4", "sweep.sampler=random",
        "sweep.startup_trials=1", "trainer.val_every_n_steps=1", "callbacks.preview=null", "data.num_eval_items=0", *more,
    )  # fmt: skip


def study_of(root: Path) -> Any:
    (folder,) = (root / "runs").glob("sweep-*")
    return optuna.load_study(study_name=folder.name, storage=f"sqlite:///{folder / 'trials.db'}")


def test_trials_are_runs_and_the_worse_ones_are_pruned(
    stand_in: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(search(stand_in, tmp_path, "sweep.num_trials=5")) == 0
    trials, found = study_of(tmp_path).trials, records(tmp_path)
    assert len(trials) == len(found) == 5
    states = [trial.state.name for trial in trials]
    assert set(states) <= {"COMPLETE", "PRUNED"}
    assert "PRUNED" in states
    assert states[0] == "COMPLETE"
    assert [record["status"] == "pruned" for record in found] == [state == "PRUNED" for state in states]
    for trial, record in zip(trials, found, strict=True):
        lines = [line for line in read_metrics(tmp_path / "runs" / record["run"]) if "val/loss" in line]
        # The last validation is the trial's value, with nothing left to stop.
        assert trial.intermediate_values == {line["step"]: line["val/loss"] for line in lines if 0 < line["step"] < 4}
        if trial.state.name == "COMPLETE":
            assert trial.value == lines[-1]["val/loss"]
            assert lines[-1]["step"] == 4
        else:
            # The median of the completed trials before it, at the step it stopped, is better than its best so far.
            earlier = [t for t in trials[: trial.number] if t.state.name == "COMPLETE"]
            step = max(trial.intermediate_values)
            at = sorted(t.intermediate_values[step] for t in earlier)
            median = (at[(len(at) - 1) // 2] + at[len(at) // 2]) / 2
            assert min(trial.intermediate_values.values()) > median
        assert f"optim.lr={trial.params['optim.lr']!r}" in record["overrides"]
    # The best run again, by the words of the board.
    board = json.loads(next((tmp_path / "runs").glob("sweep-*/board.json")).read_text())
    words = shlex.split(board["best"]["command"])[2:]
    again = fine_tune.train([*words, f"run_dir={tmp_path / 'again'}"])
    assert again["final_loss"] == min(trial.value for trial in trials if trial.value is not None)
    # Nothing is left to do.
    assert main(search(stand_in, tmp_path, "sweep.num_trials=5")) == 0
    assert len(study_of(tmp_path).trials) == 5


def test_a_killed_search_goes_on_with_the_trial_it_was_in(
    stand_in: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """As SIGKILL: nothing of ours may handle it."""

    train_step = StepModule.training_step
    count = {"steps": 0}

    def dying(self: StepModule, batch: Any, batch_idx: int) -> None:
        count["steps"] += 1
        if count["steps"] == 7:
            raise Killed
        train_step(self, batch, batch_idx)

    words = search(stand_in, tmp_path, "sweep.pruner=none", "sweep.num_trials=3")
    with monkeypatch.context() as patch:
        patch.setattr(StepModule, "training_step", dying)
        with pytest.raises(Killed):
            main(words)
    left = study_of(tmp_path).trials[-1]
    assert left.state.name == "RUNNING"
    assert main(words) == 0
    trials = study_of(tmp_path).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert trials[2].params == left.params
    assert all(math.isfinite(t.value) for t in trials if t.state.name == "COMPLETE")
    # It went on from its checkpoint, and did not begin again: one run folder for both.
    runs = [run for run in (tmp_path / "runs").iterdir() if (run / "summary.json").is_file()]
    assert len(runs) == 3
    for run in runs:
        assert [line["step"] for line in read_metrics(run)] == [0, 1, 2, 3, 4]


def test_a_trial_that_fails_counts_and_its_reason_is_kept(
    stand_in: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(self: StepModule, batch: Any, batch_idx: int) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(StepModule, "training_step", faulty)
    assert main(search(stand_in, tmp_path, "sweep.num_trials=2")) == 1
    assert [trial.state.name for trial in study_of(tmp_path).trials] == ["FAIL", "FAIL"]
    assert [record["reason"] for record in records(tmp_path)] == ["planted", "planted"]
