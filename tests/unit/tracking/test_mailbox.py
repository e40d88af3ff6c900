"""Whatever a tracker does, training is not held, is told once, and the others hear everything."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fine_tune.tracking import mailbox as module
from fine_tune.tracking.context import Ending, RunContext
from fine_tune.tracking.mailbox import Mailbox
from fine_tune.tracking.record import Sent, TrackerRecord

TOKEN = "hf_" + "Ab1" * 11


class Told:
    """Keeps what it is told; raises or hangs where asked to."""

    rewrites = forgets = False
    finish_seconds = 5.0

    def __init__(self, *, raises: str = "", hangs: str = "", note: str | None = None) -> None:
        self.raises, self.hangs, self.note = raises, hangs, note
        self.steps: list[int] = []
        self.tables: list[tuple[str, int]] = []
        self.ended: list[Ending] = []
        self.calls = self.gone = 0
        self.never = threading.Event()

    def _do(self, what: str) -> None:
        self.calls += 1
        if what == self.hangs:
            self.never.wait(60)
        if what == self.raises:
            raise ConnectionError(f"server [gone] for {TOKEN}\nat line 3")

    def start(self, context: RunContext) -> str | None:
        self._do("start")
        return self.note

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._do("log")
        self.steps.append(step)

    def rows(self, name: str, step: int, rows: list[dict[str, Any]]) -> None:
        self._do("rows")
        self.tables.append((name, step))

    def finish(self, ending: Ending) -> None:
        self._do("finish")
        self.ended.append(ending)

    def let_go(self) -> None:
        self.gone += 1
        self.never.set()


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr(module, "get_console", lambda: Console(file=stream, width=300))
    return stream


def opened(tracker: Told, folder: Path, **more: Any) -> Mailbox:
    box = Mailbox("wandb", tracker, Sent(TrackerRecord(folder), "wandb"), **more)
    box.start(RunContext(folder, "id", {}, 0))
    return box


def ended(box: Mailbox, seconds: float = 5.0) -> float:
    started = time.monotonic()
    box.finish(Ending({"steps": 3}))
    box.wait(time.monotonic() + seconds)
    return time.monotonic() - started


def test_everything_arrives_in_order_and_nothing_is_said(tmp_path: Path, printed: io.StringIO) -> None:
    tracker = Told()
    box = opened(tracker, tmp_path)
    for step in range(50):
        box.log_metrics({"train/loss": 1.0}, step=step)
    box.log_rows("previews", [{"prompt": "a"}], 49)
    box.log_rows("previews", [], 50)
    ended(box)
    assert tracker.steps == list(range(50))
    assert tracker.tables == [("previews", 49)]
    assert tracker.ended == [Ending({"steps": 3})]
    assert tracker.gone == 1
    assert printed.getvalue() == ""


@pytest.mark.parametrize("where", ["start", "log", "rows", "finish"])
def test_an_error_is_told_once_without_its_secret(where: str, tmp_path: Path, printed: io.StringIO) -> None:
    tracker = Told(raises=where)
    box = opened(tracker, tmp_path)
    for step in range(5):
        box.log_rows("previews", [{"prompt": "a"}], step)
        box.log_metrics({"train/loss": 1.0}, step=step)
    ended(box)
    (line,) = printed.getvalue().splitlines()
    assert line == (
        "warning: wandb failed (server [gone] for ***) and is left out; the run's own files are complete."
    )
    assert tracker.gone >= 1
    assert tracker.calls == {"start": 1, "rows": 2, "log": 3, "finish": 12}[where]


@pytest.mark.parametrize("where", ["start", "log", "finish"])
def test_a_hang_holds_neither_steps_nor_the_end(where: str, tmp_path: Path, printed: io.StringIO) -> None:
    tracker = Told(hangs=where)
    box = opened(tracker, tmp_path)
    started = time.monotonic()
    for step in range(1000):
        box.log_metrics({"train/loss": 1.0}, step=step)
    assert time.monotonic() - started < 1
    assert 0.3 <= ended(box, seconds=0.3) < 2
    (line,) = printed.getvalue().splitlines()
    assert "wandb had not taken everything 5 s after the end of the run and is left out" in line
    assert tracker.never.is_set(), "it was not let go"


def test_a_queue_that_is_full_leaves_it_out(tmp_path: Path, printed: io.StringIO) -> None:
    tracker = Told(hangs="log")
    box = opened(tracker, tmp_path, limit=10)
    for step in range(100):
        box.log_metrics({"train/loss": 1.0}, step=step)
    assert ended(box) < 1, "nobody waits for what was left out"
    (line,) = printed.getvalue().splitlines()
    assert "wandb is 10 messages behind and is left out" in line


def test_what_a_tracker_has_to_say_is_a_note(tmp_path: Path, printed: io.StringIO) -> None:
    ended(opened(Told(note="kept in wandb/x"), tmp_path))
    assert printed.getvalue() == "note: wandb: kept in wandb/x\n"


def test_a_resumed_run_tells_what_is_new(tmp_path: Path) -> None:
    first = opened(Told(), tmp_path)
    for step in range(8):
        first.log_metrics({"train/loss": 1.0}, step=step)
    first.log_rows("previews", [{"prompt": "a"}], 4)
    ended(first)
    again = Told()
    box = opened(again, tmp_path)
    for step in range(5, 12):
        box.log_rows("previews", [{"prompt": "a"}], step)
        box.log_metrics({"train/loss": 1.0}, step=step)
    ended(box)
    assert again.steps == [8, 9, 10, 11]
    assert [step for _, step in again.tables] == list(range(5, 12))


def test_a_step_that_failed_counts_as_not_told(tmp_path: Path, printed: io.StringIO) -> None:
    box = opened(Told(raises="log"), tmp_path)
    box.log_metrics({"train/loss": 1.0}, step=0)
    ended(box)
    assert TrackerRecord(tmp_path).last("wandb", "metrics") == -1


def test_the_identity_stays_and_damage_makes_a_new_one(tmp_path: Path) -> None:
    record = TrackerRecord(tmp_path)
    record.note("wandb", "metrics", 3)
    again = TrackerRecord(tmp_path)
    assert (again.tracker_id, again.last("wandb", "metrics"), again.last("csv", "metrics")) == (record.tracker_id, 3, -1)
    (tmp_path / "tracker.json").write_text('{"id": "x", "se')
    assert TrackerRecord(tmp_path).tracker_id not in ("x", record.tracker_id)


def test_a_tracker_that_forgets_is_told_again_from_the_checkpoint(tmp_path: Path) -> None:
    record = TrackerRecord(tmp_path)
    record.note("tensorboard", "metrics", 7)
    sent = Sent(record, "tensorboard", up_to=5)
    assert [step for step in range(9) if sent.is_new("metrics", step)] == [6, 7, 8]
    record.note("csv", "metrics", 7)
    assert Sent(record, "csv", up_to=-1).is_new("metrics", 0)
