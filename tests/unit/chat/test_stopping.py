"""Ctrl-C: noted once, obeyed at once the second time, and the earlier handler comes back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from fine_tune.chat.stopping import CtrlC


def test_the_first_is_noted_and_the_second_obeyed() -> None:
    before = signal.getsignal(signal.SIGINT)
    with CtrlC() as pressed:
        assert not pressed()
        os.kill(os.getpid(), signal.SIGINT)
        assert pressed()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_it_changes_nothing() -> None:
    found: list[bool] = []

    def use() -> None:
        with CtrlC() as pressed:
            found.append(pressed())

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert found == [False]
