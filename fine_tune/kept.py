"""What the runs of one process share, such as a sweep's: the frozen base, loaded once, and what it answered."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn

from fine_tune.evaluation.answers import Completion


class Kept:
    """A frozen base and its answers, for the next run that asks for the same.

    Runs never get the base itself but a copy of its modules over the same tensors: whatever a run does to its modules
    (adapters, compiled calls, switched attention) ends with it, and frozen tensors are only read.

    Attributes:
        num_loads: Bases loaded so far.
        answers: What the base answered, by everything that decides it.
        starts: What the validation before the first step found, by everything that decides it.
        key: Everything that decides the tensors of the base that is kept; None without one.
    """

    def __init__(self) -> None:
        self.num_loads = 0
        self.answers: dict[str, list[Completion]] = {}
        self.starts: dict[str, dict[str, float]] = {}
        self.key: Hashable = None
        self._base: nn.Module | None = None
        self._device_bytes = 0

    def base(self, key: Hashable, load: Callable[[], nn.Module]) -> nn.Module:
        """Return a base of one's own, loaded only where the last one was another.

        Args:
            key: Everything that decides its tensors.
            load: Loads it, every parameter frozen.
        """
        if self._base is None or self.key != key:
            self.forget()
            before = _allocated()
            self._base, self.key = load(), key
            self._device_bytes = _allocated() - before
            self.num_loads += 1
        return same_tensors(self._base)

    @property
    def device_bytes(self) -> int:
        """Device memory of the base; the next run uses it, or it is freed first."""
        return self._device_bytes

    def forget(self) -> None:
        """Free the base."""
        self._base, self.key, self._device_bytes = None, None, 0
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def same_tensors(model: nn.Module) -> nn.Module:
    """Copy a model's modules over the same parameters, buffers and quantisation states."""
    shared: list[Any] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        shared += [getattr(module, "quant_state", None), getattr(getattr(module, "weight", None), "quant_state", None)]
    memo = {id(one): one for one in shared if one is not None}
    return copy.deepcopy(model, memo)


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
