from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from fine_tune.evaluation.side_by_side import side_by_side

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_from_threads_of_one() -> None:
    meet = threading.Barrier(2, timeout=20)

    def job(number: int) -> tuple[int, int, bool]:
        # Nobody passes alone.
        meet.wait()
        return number, torch.get_num_threads(), torch.is_grad_enabled()

    assert side_by_side(job, list(range(6)), CPU) == [(n, 1, False) for n in range(6)]
    assert torch.get_num_threads() == 2
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_caller_s_autocast_holds(enabled: bool) -> None:
    a = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        found = side_by_side(lambda _job: (a @ a).dtype, [0, 1], CPU)
    assert found == [torch.bfloat16 if enabled else torch.float32] * 2


def test_a_mistake_is_raised_and_the_threads_come_back() -> None:
    def job(number: int) -> int:
        return 1 // number

    with pytest.raises(ZeroDivisionError):
        side_by_side(job, [1, 0, 2], CPU)
    assert torch.get_num_threads() == 2


def test_other_devices_take_one_after_the_other() -> None:
    threads = side_by_side(lambda _job: threading.current_thread(), [0, 1], torch.device("meta"))
    assert threads == [threading.current_thread()] * 2
    assert side_by_side(str, [], CPU) == []
