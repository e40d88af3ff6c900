"""Inputs of layers kept in host memory between the forward and the backward pass, copied while other layers compute."""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Copies under way at a time; each holds one layer's input on the device.
IN_FLIGHT = 2


class Kept(NamedTuple):
    """What autograd holds instead of a layer's input."""

    layer: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class OffloadedInputs:
    """Moves each layer's input to pinned memory behind the forward pass, and back one layer ahead of the backward pass.

    Source: Unsloth's offloaded checkpointing (2024) as an idea; the copies here run on a stream of their own.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._buffers: dict[int, Tensor] = {}
        self._leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._coming: dict[int, tuple[Tensor, torch.cuda.Event]] = {}

    def keeping(self, hidden: Tensor, index: int) -> AbstractContextManager[Any]:
        """Within the block, what autograd saves of ``hidden`` is saved in host memory; on the CPU nothing moves."""
        if index == 0:
            # A pass that did not come to its end may have left something.
            self._leaving.clear()
            self._coming.clear()

        # Autograd keeps this function as long as what it packs: it must not hold the tensor itself.
        address, size = hidden.data_ptr(), hidden.numel()

        def pack(saved: Tensor) -> Tensor | Kept:
            same = saved.is_cuda and saved.data_ptr() == address and saved.numel() == size
            return self._send(saved, index) if same else saved

        return torch.autograd.graph.saved_tensors_hooks(pack, self._unpack)

    def _send(self, hidden: Tensor, index: int) -> Kept:
        stream = self._side_stream(hidden.device)
        buffer = self._buffer(index, hidden)
        stream.wait_stream(torch.cuda.current_stream(hidden.device))
        with torch.cuda.stream(stream):
            buffer.copy_(hidden.detach().reshape(-1), non_blocking=True)
        self._leaving.append((hidden.detach(), stream.record_event()))
        while len(self._leaving) > IN_FLIGHT:
            self._let_go()
        return Kept(index, hidden.shape, hidden.dtype, hidden.device)

    def _let_go(self) -> None:
        """Give a tensor's memory back: whoever gets it next waits for the copy."""
        hidden, copied = self._leaving.popleft()
        torch.cuda.current_stream(hidden.device).wait_event(copied)

    def _unpack(self, kept: Tensor | Kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        while self._leaving:
            self._let_go()
        if kept.layer not in self._coming:
            self._fetch(kept)
        hidden, arrived = self._coming.pop(kept.layer)
        torch.cuda.current_stream(kept.device).wait_event(arrived)
        if kept.layer > 0:
            # Layers are alike: the next one down has an input of the same shape.
            self._fetch(kept._replace(layer=kept.layer - 1))
        return hidden

    def _fetch(self, kept: Kept) -> None:
        stream = self._side_stream(kept.device)
        hidden = torch.empty(kept.shape, dtype=kept.dtype, device=kept.device)
        # The memory may have been another tensor's a moment ago.
        stream.wait_stream(torch.cuda.current_stream(kept.device))
        with torch.cuda.stream(stream):
            hidden.copy_(self._buffers[kept.layer][: hidden.numel()].view(kept.shape), non_blocking=True)
        self._coming[kept.layer] = (hidden, stream.record_event())

    def _buffer(self, index: int, hidden: Tensor) -> Tensor:
        """Pinned memory for one layer's input; it grows, as pinning takes milliseconds."""
        found = self._buffers.get(index)
        if found is None or found.numel() < hidden.numel() or found.dtype != hidden.dtype:
            found = torch.empty(hidden.numel(), dtype=hidden.dtype, pin_memory=True)
            self._buffers[index] = found
        return found[: hidden.numel()]

    def _side_stream(self, device: torch.device) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream
