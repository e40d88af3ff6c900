"""Ctrl-C while something must not be torn apart: noted the first time, obeyed at once the second."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class CtrlC:
    """Own SIGINT for a block; calling it tells whether it has come.

    The first one is only noted, so that an answer can end between two tokens; a second one raises ``KeyboardInterrupt``
    where it arrives, for an answer whose next token takes long.
    """

    def __init__(self) -> None:
        self._pressed = False
        self._before: Any = None

    def __call__(self) -> bool:
        """Tell whether it has come."""
        return self._pressed

    def __enter__(self) -> CtrlC:
        """Install the handler (in the main thread; elsewhere Python allows none)."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        """Put the earlier handler back."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._pressed:
            raise KeyboardInterrupt
        self._pressed = True
