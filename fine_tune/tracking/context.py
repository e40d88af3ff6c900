"""What a tracker is told about its run, and the one shape that every tracker has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class RunContext:
    """A run as its trackers see it.

    Attributes:
        folder: The run's folder.
        tracker_id: The identity that a resumed run goes on under.
        config: The resolved config without secrets.
        first_step: Optimizer steps done before this start.
    """

    folder: Path
    tracker_id: str
    config: Mapping[str, Any]
    first_step: int


@dataclass(frozen=True)
class Ending:
    """How a run ended.

    Attributes:
        summary: Numbers of summary.json; empty when the run did not finish.
        adapter: The exported adapter's folder, or None.
        best: The adapter is of the step with the lowest validation loss.
        step: The step the adapter is of.
        failed: The run was stopped by an error or a signal.
    """

    summary: Mapping[str, float]
    adapter: Path | None = None
    best: bool = False
    step: int = 0
    failed: bool = False


class Tracker(Protocol):
    """Where metrics are sent. Calls come from one thread, one after the other; each may raise or never return.

    Attributes:
        rewrites: It holds what a start tells it and nothing of earlier ones, so a resumed run is told from its beginning.
        forgets: Steps after the checkpoint that a run goes on from are forgotten, so they are told again.
        finish_seconds: How long the end of a run waits for it.
    """

    rewrites: bool
    forgets: bool
    finish_seconds: float

    def start(self, context: RunContext) -> str | None:
        """Connect; return a sentence for the user, if there is something to say."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take a step's numbers."""

    def rows(self, name: str, step: int, rows: list[dict[str, Any]]) -> None:
        """Take rows of text as a table."""

    def finish(self, ending: Ending) -> None:
        """Take the adapter, and send or write everything."""

    def let_go(self) -> None:
        """Stop whatever runs for it, without waiting; called from another thread too, and more than once."""


def numbers_of(line: Mapping[str, Any]) -> dict[str, float]:
    """Return what trackers are told of a line of metrics.jsonl.

    Example:
        >>> numbers_of({"step": 3, "train/loss": 2.0, "mfu": None})
        {'train/loss': 2.0}
    """
    return {key: value for key, value in line.items() if key != "step" and isinstance(value, int | float)}
