"""The trackers of a run: told what they missed, ended together, whatever happened."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fine_tune.tracking import run_trackers
from fine_tune.tracking.context import Ending, RunContext
from fine_tune.tracking.local import LightningTracker
from fine_tune.tracking.run_trackers import RunTrackers, make_tracker
from fine_tune.tracking.wandb_tracker import WandbTracker

SECRET = "hf_" + "Ab1" * 11
CFG = {"seed": 1, "model": {"path": f"https://me:{SECRET}@host/x"}, "logger": {"a": {"_target_": "a"}, "off": None}}


class Told:
    rewrites = forgets = False
    finish_seconds = 0.5

    def __init__(self, *, hangs: bool = False) -> None:
        self.hangs, self.never = hangs, threading.Event()
        self.context: RunContext | None = None
        self.entries: list[Any] = []
        self.endings: list[Ending] = []

    def start(self, context: RunContext) -> None:
        self.context = context

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.entries.append((step, dict(numbers)))

    def rows(self, name: str, step: int, rows: list[dict[str, Any]]) -> None:
        self.entries.append((step, name, len(rows)))

    def finish(self, ending: Ending) -> None:
        if self.hangs:
            self.never.wait(30)
        self.endings.append(ending)

    def let_go(self) -> None:
        self.never.set()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Told]:
    trackers: list[Told] = []

    def make(node: Mapping[str, Any]) -> Told:
        trackers.append(Told(hangs=node["_target_"] == "hanging"))
        return trackers[-1]

    monkeypatch.setattr(run_trackers, "make_tracker", make)
    return trackers


def write(folder: Path, steps: int) -> None:
    lines = [{"step": step, "train/loss": 5.0 - step, "mfu": None} for step in range(1, steps + 1)]
    lines[1]["val/loss"] = 3.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [{"step": step, "prompt": prompt} for step in (0, 2, 4) for prompt in ("a", "b")]
    (folder / "previews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_tracker_that_comes_late_is_told_what_it_missed(tmp_path: Path, made: list[Told]) -> None:
    write(tmp_path, 4)
    with RunTrackers() as trackers:
        trackers.open(CFG, tmp_path, first_step=3)
        (logger,) = trackers.loggers
        logger.log_metrics({"train/loss": 1.0}, step=4)
    assert made[0].entries == [
        (0, "previews", 2), (1, {"train/loss": 4.0}), (2, {"train/loss": 3.0, "val/loss": 3.0}), (2, "previews", 2),
        (3, {"train/loss": 2.0}), (4, {"train/loss": 1.0}),
    ]  # fmt: skip
    assert made[0].context is not None
    assert made[0].context.config["model"] == {"path": "***"}


@pytest.mark.parametrize(("step", "best"), [(2, True), (4, False)])
def test_a_run_that_ends_well_hands_over_summary_and_adapter(
    step: int, best: bool, tmp_path: Path, made: list[Told]
) -> None:
    write(tmp_path, 4)
    (tmp_path / "adapter").mkdir()
    with RunTrackers() as trackers:
        trackers.open(CFG, tmp_path)
        summary = {"final_loss": 2.5, "steps": 4, "method": "lora", "kl": None, "ok": True, "odd": float("inf")}
        trackers.finish(summary, adapter=tmp_path / "adapter", step=step)
    assert made[0].endings == [Ending({"final_loss": 2.5, "steps": 4}, tmp_path / "adapter", best, step)]


def test_a_run_that_fails_ends_its_trackers_as_failed(tmp_path: Path, made: list[Told]) -> None:
    def fail() -> None:
        with RunTrackers() as trackers:
            trackers.open(CFG, tmp_path)
            trackers.finish({"final_loss": 2.5}, adapter=tmp_path, step=1)
            raise RuntimeError("later")

    with pytest.raises(RuntimeError, match="later"):
        fail()
    assert made[0].endings == [Ending({}, failed=True)]


def test_trackers_that_hang_are_waited_for_together(tmp_path: Path, made: list[Told]) -> None:
    loggers = {name: {"_target_": "hanging"} for name in "abc"} | {"good": {"_target_": "good"}}
    started = time.monotonic()
    with RunTrackers() as trackers:
        trackers.open({"logger": loggers}, tmp_path)
    assert 0.5 <= time.monotonic() - started < 1.2
    assert len(made[3].endings) == 1


@pytest.mark.parametrize(("cfg", "rank"), [(CFG, 1), ({"logger": {}}, 0), ({"logger": {"off": None}}, 0)])
def test_other_ranks_and_runs_without_trackers_leave_no_file(
    cfg: dict[str, Any], rank: int, tmp_path: Path, made: list[Told]
) -> None:
    with RunTrackers() as trackers:
        trackers.open(cfg, tmp_path, rank=rank)
        # Lightning's own monitors want a logger on every rank.
        assert len(trackers.loggers) == rank
        for logger in trackers.loggers:
            logger.log_metrics({"train/loss": 1.0}, step=1)
        trackers.finish({}, adapter=tmp_path, step=1)
    assert list(tmp_path.iterdir()) == []
    assert made == []


def test_a_node_names_its_tracker_also_as_earlier_versions_did() -> None:
    old = {"project": "p", "entity": None, "offline": True, "tags": ["a"]}
    for target in ("lightning.pytorch.loggers.WandbLogger", "fine_tune.tracking.wandb_tracker.WandbTracker"):
        tracker = make_tracker({"_target_": target, **old})
        assert isinstance(tracker, WandbTracker)
        assert tracker.offline
    assert isinstance(make_tracker({"_target_": "lightning.pytorch.loggers.CSVLogger"}), LightningTracker)
