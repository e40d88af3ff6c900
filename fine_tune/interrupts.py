"""SIGTERM, Ctrl-C and a cluster's notice: at once outside training, at the next step boundary inside it."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from fine_tune.errors import FineTuneError


class Interrupted(FineTuneError):
    """A signal stopped the run; the exit code follows the shell's rule of 128 + signal."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes, as launchers send it."""
        return type(self), (self.exit_code - 128, str(self))


class StopSignals:
    """Own SIGTERM, SIGINT and, where nobody else does, SIGUSR1 while a run lasts.

    Clusters send SIGUSR1 when a job's time is nearly up (``#SBATCH --signal=USR1@120``): it means what SIGTERM means, and the
    run ends with SIGTERM's exit code.

    Outside training a signal raises :class:`Interrupted` where it arrives. While ``deferred`` it is only noted, so that the
    step can finish and be saved; a second Ctrl-C then stops at once, without saving.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.deferred = False
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        """Install the handlers (in the main thread; elsewhere Python allows none)."""
        if threading.current_thread() is threading.main_thread():
            # A launcher's own handler, such as submitit's, puts the job back into the queue: it stays.
            free = signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
            owned = (*self.SIGNALS, signal.SIGUSR1) if free else self.SIGNALS
            self._before = {number: signal.getsignal(number) for number in owned}
            self.install()
        return self

    def __exit__(self, *exception: object) -> None:
        """Put the earlier handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Take the signals over, also from a library that put its own handlers in between."""
        if threading.current_thread() is threading.main_thread():
            for number in self._before or self.SIGNALS:
                signal.signal(number, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        name = signal.Signals(signum).name
        signum = signal.SIGTERM if signum == signal.SIGUSR1 else signum
        if not self.deferred:
            text = f"stopped by {name} outside training. What was saved before can be resumed with resume=<run folder>."
            raise Interrupted(signum, text)
        if self.received is not None and signum == signal.SIGINT:
            raise Interrupted(signum, f"stopped by a second {name}: nothing was saved since the last checkpoint.")
        self.received = signum
