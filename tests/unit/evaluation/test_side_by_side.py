from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fine_tune.evaluation.side_by_side import AHEAD, side_by_side

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("two_threads")


def test_results_come_in_order_from_threads_of_one() -> None:
    meet = threading.Barrier(2, timeout=20)

    def job(number: int) -> tuple[int, int, bool]:
        # Nobody passes alone.
        meet.wait()
        return number, torch.get_num_threads(), torch.is_grad_enabled()

    assert list(side_by_side(job, range(6), CPU)) == [(n, 1, False) for n in range(6)]
    assert torch.get_num_threads() == 2
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_caller_s_autocast_holds(enabled: bool) -> None:
    a = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        found = list(side_by_side(lambda _job: (a @ a).dtype, [0, 1], CPU))
    assert found == [torch.bfloat16 if enabled else torch.float32] * 2


def test_a_mistake_is_raised_and_the_threads_come_back() -> None:
    def job(number: int) -> int:
        return 1 // number

    with pytest.raises(ZeroDivisionError):
        list(side_by_side(job, [1, 0, 2], CPU))
    # Threads that start later take over the number that was set last.
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == 2


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_jobs_are_taken_when_they_are_needed_and_none_after_the_end(device: str) -> None:
    taken: list[int] = []
    done: list[int] = []

    def jobs() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    def job(number: int) -> int:
        done.append(number)
        return number

    found = side_by_side(job, jobs(), torch.device(device))
    ahead = 2 * AHEAD if device == "cpu" else 0
    assert taken == []
    assert [next(found), next(found)] == [0, 1]
    assert taken == list(range(2 + ahead))
    found.close()
    assert taken == list(range(2 + ahead))
    assert torch.get_num_threads() == 2
    assert set(done) <= set(taken)


def test_what_was_handed_out_is_dropped_when_closed() -> None:
    gate, begun = threading.Event(), threading.Semaphore(0)
    done: list[int] = []

    def job(number: int) -> None:
        done.append(number)
        begun.release()
        # The first result is there at once; two jobs hold both threads until the rest was dropped.
        if number:
            gate.wait(20)

    found = side_by_side(job, range(100), CPU)
    next(found)
    for _ in range(3):
        assert begun.acquire(timeout=20)
    threading.Timer(0.2, gate.set).start()
    found.close()
    assert sorted(done) == [0, 1, 2]


def test_other_devices_take_one_after_the_other() -> None:
    threads = side_by_side(lambda _job: threading.current_thread(), [0, 1], torch.device("meta"))
    assert list(threads) == [threading.current_thread()] * 2
    assert list(side_by_side(str, [], CPU)) == []
