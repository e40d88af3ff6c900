"""A process that builds batches and dies is told in a sentence; another error stays what it is."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from fine_tune.data.module import dead_workers_told
from fine_tune.errors import EnvironmentProblem


class Numbers(Dataset[int]):
    def __init__(self, deadly: int | None = None) -> None:
        self.deadly = deadly

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        if index == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_worker_that_dies_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    # Between looks at the workers, in seconds: torch's are five apart.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    has_died = pytest.raises(EnvironmentProblem, match=r"trainer\.num_workers=1: a process that builds batches has died")
    with has_died as told, dead_workers_told(1):
        list(DataLoader(Numbers(deadly=3), batch_size=None, num_workers=1))
    assert told.value.exit_code == 5
    assert "resume=" in str(told.value)


class Broken(Numbers):
    def __getitem__(self, index: int) -> int:
        raise RuntimeError("a fault of our own")


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="a fault of our own"), dead_workers_told(0):
        list(DataLoader(Broken(), batch_size=None))


def test_a_death_is_told_wherever_torchs_handler_raises_it() -> None:
    with pytest.raises(EnvironmentProblem, match=r"num_workers=2: .* \(DataLoader worker \(pid 7\) is"), dead_workers_told(2):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    with pytest.raises(RuntimeError, match="another"), dead_workers_told(2):
        raise RuntimeError("another error")
