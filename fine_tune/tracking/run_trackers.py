"""All trackers of a run: opened when its folder is ready, told what they missed, and ended within a bound."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning.pytorch.loggers.logger import DummyLogger, Logger

from fine_tune.redaction import redact
from fine_tune.storage import read_lines
from fine_tune.targets import build
from fine_tune.tracking.context import Ending, RunContext, Tracker, numbers_of
from fine_tune.tracking.local import LightningTracker
from fine_tune.tracking.mailbox import Mailbox
from fine_tune.tracking.record import Sent, TrackerRecord

OURS = "fine_tune.tracking."
# What configs of earlier versions name.
EARLIER = {"lightning.pytorch.loggers.WandbLogger": "fine_tune.tracking.wandb_tracker.WandbTracker"}


class RunTrackers:
    """The trackers of one run; as a context manager it ends them, whatever happened.

    Attributes:
        loggers: For Lightning's trainer; empty until opened, and deaf on every rank but the first.
    """

    def __init__(self) -> None:
        self.loggers: list[Logger] = []
        self._boxes: list[Mailbox] = []
        self._folder = Path()
        self._ending: Ending | None = None

    def __enter__(self) -> RunTrackers:
        """Nothing is open yet."""
        return self

    def open(self, cfg: Mapping[str, Any], folder: Path, *, first_step: int = 0, rank: int = 0) -> None:
        """Start the trackers of the config and tell them the steps that earlier starts of the run left out.

        Args:
            cfg: The run's config.
            folder: Its folder, as the earlier start left it.
            first_step: Optimizer steps already done.
            rank: Only rank 0 tells trackers anything.

        Raises:
            ConfigError: A class does not take the keys beside it.
        """
        nodes = {name: node for name, node in cfg["logger"].items() if node is not None}
        if rank > 0:
            self.loggers = [DummyLogger() for _ in nodes]
        if rank > 0 or not nodes:
            return
        self._folder, record = folder, TrackerRecord(folder)
        context = RunContext(folder, record.tracker_id, redact(dict(cfg)), first_step)
        for name, node in nodes.items():
            tracker = make_tracker(node)
            sent = Sent(record, name, up_to=-1 if tracker.rewrites else first_step if tracker.forgets else None)
            mailbox = Mailbox(name, tracker, sent)
            self._boxes.append(mailbox)
            mailbox.start(context)
            _tell_earlier(mailbox, folder, first_step)
        self.loggers = [*self._boxes]

    def finish(self, summary: Mapping[str, Any], *, adapter: Path, step: int) -> None:
        """Say how the run ended; ``step`` is the one its adapter is of."""
        numbers = {name: value for name, value in summary.items() if _is_number(value)}
        best = best_step(read_lines(self._folder / "metrics.jsonl")) == step if self._boxes else False
        self._ending = Ending(numbers, adapter if adapter.is_dir() else None, best, step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all trackers at once, waiting as long as the most patient of them asks for."""
        ending = self._ending if self._ending is not None and kind is None else Ending({}, failed=kind is not None)
        for box in self._boxes:
            box.finish(ending)
        started = time.monotonic()
        try:
            for box in self._boxes:
                box.wait(started + box.tracker.finish_seconds)
        finally:
            for box in self._boxes:
                box.tracker.let_go()


def make_tracker(node: Mapping[str, Any]) -> Tracker:
    """Build the tracker that a logger's node names."""
    target = EARLIER.get(node["_target_"], node["_target_"])
    if not target.startswith(OURS):
        return LightningTracker(node)
    tracker: Tracker = build({**node, "_target_": target})
    return tracker


def best_step(lines: Iterable[Mapping[str, Any]]) -> int | None:
    """Return the step with the lowest validation loss, the first of equals; None without validation.

    Example:
        >>> best_step([{"step": 0, "val/loss": 3.0}, {"step": 5, "val/loss": 2.0}, {"step": 6}])
        5
    """
    found = [(line["val/loss"], line["step"]) for line in lines if line.get("val/loss") is not None]
    return min(found)[1] if found else None


def _tell_earlier(mailbox: Mailbox, folder: Path, first_step: int) -> None:
    """Tell a tracker the steps up to the checkpoint that it was not told; it sorts out those it was."""
    if not first_step:
        return
    lines = [(line["step"], "metrics", line) for line in read_lines(folder / "metrics.jsonl", up_to_step=first_step)]
    shown = read_lines(folder / "previews.jsonl", up_to_step=first_step)
    tables = [(step, "previews", list(rows)) for step, rows in groupby(shown, key=lambda row: row["step"])]
    told: list[tuple[int, str, Any]] = sorted([*lines, *tables], key=lambda entry: entry[:2])
    for step, kind, what in told:
        if kind == "metrics":
            mailbox.log_metrics(numbers_of(what), step)
        else:
            mailbox.log_rows(kind, what, step)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
