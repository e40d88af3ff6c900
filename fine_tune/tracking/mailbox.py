"""Between training and a tracker: a bounded queue and a thread, so that nothing a tracker does is waited for."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from rich import get_console

from fine_tune.redaction import masked
from fine_tune.tracking.context import Ending, RunContext, Tracker
from fine_tune.tracking.record import Sent
from fine_tune.visible import visible

# Messages that may wait. At one or two a step, a tracker this far behind is not coming back.
LIMIT = 10_000
Action = Callable[[], None]


class Mailbox(Logger):
    """A tracker as training sees it: every call returns at once and none raises.

    The tracker's first error, or a queue that is full, leaves it out from there on, with one warning.

    Args:
        name: The tracker's name in the config.
        tracker: What is told.
        sent: How far it was told, now and by earlier starts.
        limit: Messages that may wait.
    """

    def __init__(self, name: str, tracker: Tracker, sent: Sent, *, limit: int = LIMIT) -> None:
        super().__init__()
        self._name, self.tracker, self.sent = name, tracker, sent
        self._queue: queue.Queue[Action | None] = queue.Queue(limit)
        self._reason: str | None = None
        self._note: str | None = None
        self._said = False
        # A daemon: a tracker that hangs does not hold the process.
        self._thread = threading.Thread(target=self._deliver, name=f"tracker-{name}", daemon=True)

    @property
    def name(self) -> str:
        """The tracker's name in the config."""
        return self._name

    @property
    def version(self) -> str:
        """Lightning asks for one; folders of ours have none."""
        return ""

    @property
    def save_dir(self) -> str | None:
        """None: Lightning writes nothing of its own."""
        return None

    def start(self, context: RunContext) -> None:
        """Connect the tracker, in its thread."""

        def connect() -> None:
            self._note = self.tracker.start(context)

        self._put(connect)
        self._thread.start()

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the config was handed over at the start."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Pass a step's numbers on, unless an earlier start of the run has."""
        if step is None or not self.sent.is_new("metrics", step):
            return
        numbers = dict(metrics)
        self._put(lambda: self._tell("metrics", step, lambda: self.tracker.log(step, numbers)))

    def log_rows(self, name: str, rows: list[dict[str, Any]], step: int) -> None:
        """Pass rows of text on, unless an earlier start of the run has."""
        if not rows or not self.sent.is_new(name, step):
            return
        copied = [dict(row) for row in rows]
        self._put(lambda: self._tell(name, step, lambda: self.tracker.rows(name, step, copied)))

    def _tell(self, kind: str, step: int, action: Action) -> None:
        action()
        self.sent.note(kind, step)

    def finish(self, ending: Ending) -> None:
        """Ask for the end, without waiting."""
        self._put(lambda: self.tracker.finish(ending))
        self._put(None)

    def wait(self, deadline: float) -> None:
        """Wait for the end until a moment of the monotonic clock, then let the tracker go."""
        if self._thread.ident is not None and self._reason is None:
            self._thread.join(max(0.0, deadline - time.monotonic()))
            if self._thread.is_alive():
                self._leave_out(f"had not taken everything {self.tracker.finish_seconds:g} s after the end of the run")
        self._speak()
        self.tracker.let_go()

    def _put(self, action: Action | None) -> None:
        self._speak()
        if self._reason is not None:
            return
        try:
            self._queue.put_nowait(action)
        except queue.Full:
            self._leave_out(f"is {self._queue.maxsize} messages behind")
            self._speak()

    def _deliver(self) -> None:
        while (action := self._queue.get()) is not None and self._reason is None:
            try:
                action()
            except Exception as error:
                # Whatever a tracker raises, training goes on.
                self._leave_out(f"failed ({_brief(error)})")
                return

    def _leave_out(self, reason: str) -> None:
        if self._reason is None:
            self._reason = reason
            self.tracker.let_go()

    def _speak(self) -> None:
        """Say what there is to say, in the thread that trains; once each."""
        if self._note is not None:
            _say(f"note: {self._name}: {self._note}")
            self._note = None
        if self._reason is not None and not self._said:
            self._said = True
            _say(f"warning: {self._name} {self._reason} and is left out; the run's own files are complete.")


def _brief(error: Exception, limit: int = 300) -> str:
    """An error's first line that says something, without secrets."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return masked(lines[0])[:limit]


def _say(line: str) -> None:
    get_console().print(visible(line), style="yellow" if line.startswith("warning") else None, markup=False, highlight=False)
