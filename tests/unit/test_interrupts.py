"""Signals: at once outside training, noted inside it, and the handlers put back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from fine_tune.interrupts import Interrupted, StopSignals

BOTH = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize(("signum", "code"), BOTH)
def test_outside_training_a_signal_stops_at_once(signum: signal.Signals, code: int) -> None:
    with pytest.raises(Interrupted, match=f"stopped by {signum.name} ") as stopped, StopSignals():
        send(signum)
    assert stopped.value.exit_code == code


@pytest.mark.parametrize(("signum", "code"), BOTH)
def test_inside_a_step_it_is_noted(signum: int, code: int) -> None:
    with StopSignals() as signals:
        signals.deferred = True
        assert signals.received is None
        send(signum)
        assert signals.received == signum


def test_a_second_ctrl_c_stops_at_once_and_a_second_sigterm_does_not() -> None:
    with StopSignals() as signals:
        signals.deferred = True
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        with pytest.raises(Interrupted, match="stopped by a second SIGINT: nothing was saved") as stopped:
            send(signal.SIGINT)
    assert stopped.value.exit_code == 130


def test_the_notice_of_a_cluster_means_what_sigterm_means() -> None:
    with pytest.raises(Interrupted, match="stopped by SIGUSR1 outside training") as stopped, StopSignals():
        send(signal.SIGUSR1)
    assert stopped.value.exit_code == 143
    with StopSignals() as signals:
        signals.deferred = True
        send(signal.SIGUSR1)
        assert signals.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_launchers_own_handler_of_the_notice_stays() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    try:
        with StopSignals() as signals:
            signals.install()
            send(signal.SIGUSR1)
            assert (seen, signals.received) == ([signal.SIGUSR1], None)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_earlier_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in StopSignals.SIGNALS]
    with StopSignals():
        assert all(signal.getsignal(n) != b for n, b in zip(StopSignals.SIGNALS, before, strict=True))
    assert [signal.getsignal(number) for number in StopSignals.SIGNALS] == before


def test_signals_are_taken_back_from_a_library() -> None:
    with StopSignals() as signals:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signals.install()
        with pytest.raises(Interrupted):
            send(signal.SIGTERM)


def test_another_thread_leaves_the_handlers_alone() -> None:
    before = [signal.getsignal(number) for number in StopSignals.SIGNALS]
    seen: list[object] = []

    def enter() -> None:
        with StopSignals() as signals:
            signals.install()
            seen.extend(signal.getsignal(number) for number in StopSignals.SIGNALS)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == before
