"""A checkpoint as evaluate.py loads it: the base in 4 bits, and an adapter with weights that are not zero."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fine_tune.models.adapter import AdapterSpec, adapter_off, attach, causal_lm
from fine_tune.models.attention import PACKED
from fine_tune.models.base import BaseSpec, load_base, set_attention
from fine_tune.models.fused_lora import fuse, fuse_frozen

RANK = 64


def load(folder: Path, *, device: torch.device, dtype: torch.dtype, bits: int = 4) -> nn.Module:
    """Load a model folder with a random adapter on all linear layers."""
    network = attach(load_base(BaseSpec(folder, bits, dtype, dtype, device)), AdapterSpec("adapter", rank=RANK, alpha=16))
    generator = torch.Generator(device=device).manual_seed(1)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02, generator=generator)
    return network.eval()


def fused(network: nn.Module) -> None:
    """Let the layers take our operations, as evaluate.py does on a GPU."""
    fuse(network)
    fuse_frozen(network)


@contextmanager
def as_transformers_does(network: nn.Module, *, adapter: bool) -> Iterator[Any]:
    """Lend the model with transformers' own attention, with its adapter or without; ours comes back afterwards."""
    inner = causal_lm(network)
    set_attention(inner, "sdpa")
    try:
        if adapter:
            yield network
        else:
            with adapter_off(network):
                yield inner
    finally:
        set_attention(inner, PACKED)


class Seconds:
    """Seconds of a block on the clock, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time a block."""
        self._wait()
        before = time.perf_counter()
        yield
        self._wait()
        self.seconds = time.perf_counter() - before

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
