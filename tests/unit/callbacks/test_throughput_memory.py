"""Paged optimizer state is counted once it is there, against the limit and in the summary."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fine_tune.callbacks import throughput
from fine_tune.callbacks.throughput import Throughput
from fine_tune.modules.optim import paged_bytes

CUDA = torch.device("cuda", 0)


class Paged(torch.optim.AdamW):
    """An optimizer that puts the state of large weights into pages, as bitsandbytes does."""

    is_paged = True

    def fill(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                state = {"state1": torch.zeros(weight.shape), "step": torch.tensor(1.0), "state2": torch.zeros(weight.shape)}
                if weight.numel() >= 100:
                    for name in ("state1", "state2"):
                        state[name].is_paged = True  # type: ignore[attr-defined]
                self.state[weight] = state


def optimizer() -> Paged:
    return Paged([torch.nn.Parameter(torch.zeros(10, 20)), torch.nn.Parameter(torch.zeros(3))])


def trainer(*optimizers: torch.optim.Optimizer) -> Any:
    return SimpleNamespace(optimizers=list(optimizers), strategy=SimpleNamespace(root_device=CUDA))


def test_pages_are_counted_and_nothing_else() -> None:
    found = optimizer()
    assert paged_bytes(found) == 0
    found.fill()
    assert paged_bytes(found) == 2 * 200 * 4
    plain = torch.optim.AdamW([torch.nn.Parameter(torch.ones(500))])
    plain.param_groups[0]["params"][0].grad = torch.ones(500)
    plain.step()
    assert paged_bytes(plain) == 0


def test_pages_lower_the_limit_once_as_soon_as_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered: list[int] = []
    monkeypatch.setattr(throughput, "leave_room", lambda device, size: lowered.append(size))
    callback, found = Throughput(), optimizer()
    callback._count_paged(trainer(found))
    assert callback.paged == 0, "a loss scaler skipped the first update"
    found.fill()
    for _ in range(2):
        callback._count_paged(trainer(found))
    assert [size for size in lowered if size] == [1600]
    assert callback.paged == 1600


def test_an_optimizer_without_pages_is_not_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "paged_bytes", lambda one: pytest.fail("looked"))
    Throughput()._count_paged(trainer(torch.optim.AdamW([torch.nn.Parameter(torch.ones(5))])))


def test_the_summary_names_limit_and_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 * 10**9)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 8 * 10**9)
    callback = Throughput()
    callback.paged, callback.limit = 1_279_262_720, 15 * 10**9 - 1
    found = callback.summary(CUDA)
    assert (found["peak_memory_gb"], found["reserved_memory_gb"]) == (7.0, 8.0)
    assert (found["host_paged_gb"], found["memory_limit_gb"]) == (1.27926272, 15.0)
    on_cpu = Throughput().summary(torch.device("cpu"))
    assert (on_cpu["host_paged_gb"], on_cpu["memory_limit_gb"]) == (None, None)
