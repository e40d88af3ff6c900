"""Loggers of Lightning as trackers: files are whole at every moment, and rows show as what they are."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fine_tune.errors import ConfigError
from fine_tune.tracking.context import Ending, RunContext
from fine_tune.tracking.local import LightningTracker

CSV = {"_target_": "lightning.pytorch.loggers.CSVLogger", "name": "csv", "version": ""}
TENSORBOARD = {"_target_": "lightning.pytorch.loggers.TensorBoardLogger", "name": "tensorboard", "version": ""}


def started(node: dict[str, Any], folder: Path, first_step: int = 0) -> LightningTracker:
    tracker = LightningTracker(node)
    tracker.start(RunContext(folder, "id", {}, first_step))
    return tracker


def test_a_table_is_on_the_disk_after_every_step(tmp_path: Path) -> None:
    tracker = started(CSV, tmp_path)
    assert (tracker.rewrites, tracker.forgets) == (True, True)
    for step, numbers in ((0, {"val/loss": 4.0}), (1, {"train/loss": 3.0})):
        tracker.log(step, numbers)
        with (tmp_path / "csv" / "metrics.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert [int(row["step"]) for row in rows] == list(range(step + 1))
    assert rows[1]["train/loss"] == "3.0"
    tracker.rows("previews", 1, [{"prompt": "a"}])
    tracker.finish(Ending({}))


def test_events_are_on_the_disk_after_every_step_and_forgotten_past_a_checkpoint(tmp_path: Path) -> None:
    tracker = started(TENSORBOARD, tmp_path)
    assert (tracker.rewrites, tracker.forgets) == (False, True)
    for step in range(1, 8):
        tracker.log(step, {"train/loss": float(step)})
    tracker.rows("previews", 4, [{"prompt": "a"}])
    written = EventAccumulator(str(tmp_path / "tensorboard"))
    written.Reload()
    assert [event.step for event in written.Scalars("train/loss")] == list(range(1, 8))
    assert len(written.Tags()["tensors"]) == 1
    again = started(TENSORBOARD, tmp_path, first_step=5)
    for step in range(6, 10):
        again.log(step, {"train/loss": float(step + 10)})
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [
        *((step, step) for step in range(1, 6)), *((step, step + 10) for step in range(6, 10))
    ]  # fmt: skip
    for each in (tracker, again):
        each.finish(Ending({}))


def test_rows_of_text_go_to_a_table_or_to_indented_markdown(tmp_path: Path) -> None:
    told: list[Any] = []
    rows = [{"prompt": "a\n# b", "completion": "c"}]
    tracker = LightningTracker(CSV)
    tracker._logger = SimpleNamespace(log_text=lambda *a, **k: told.append((a, k)))
    tracker.rows("previews", 3, rows)
    assert told.pop() == (("previews",), {"columns": ["prompt", "completion"], "data": [["a\n# b", "c"]], "step": 3})
    tracker._logger = SimpleNamespace(experiment=SimpleNamespace(add_text=lambda *a: told.append(a)))
    tracker.rows("previews", 3, rows)
    assert told.pop() == ("previews/0", "prompt:\n\n    a\n    # b\n\ncompletion:\n\n    c", 3)
    tracker._logger = SimpleNamespace(experiment=SimpleNamespace())
    tracker.rows("previews", 3, rows)
    assert told == []


def test_a_key_that_a_class_does_not_take_ends_the_run_before_it_starts() -> None:
    with pytest.raises(ConfigError, match="unexpected keyword argument 'colour'"):
        LightningTracker({**CSV, "colour": "red"})
