"""A network of like layers to compile, and micro-batches with and without shared prompts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fine_tune.models.adapter import AdapterSpec, attach
from fine_tune.models.base import load_base
from fine_tune.models.execution import Execution
from fine_tune.packing.batches import MicroBatch, Sample, pack

from .conftest import VOCABULARY, base_spec, llama, randomize

LAYERS = 4
EAGER = {
    "fused": Execution(fused_lora=True),
    "selective": Execution("selective"),
    "selective, fused": Execution("selective", fused_lora=True),
    "full": Execution("full"),
    "full, offload, fused": Execution("full", offload=True, fused_lora=True),
}
COMPILED = {
    "compiled": Execution(compile=True),
    "compiled, fused": Execution(compile=True, fused_lora=True),
    "compiled, selective": Execution("selective", compile=True),
    "compiled, selective, fused": Execution("selective", compile=True, fused_lora=True),
    "compiled, full": Execution("full", compile=True),
    "compiled, full, offload, fused": Execution("full", offload=True, compile=True, fused_lora=True),
}


def policy(dtype: torch.dtype = torch.float64, folder: Path | None = None) -> nn.Module:
    """Four like layers with two adapted products each; dense, or in 4 bits from a folder."""
    model: Any = llama() if folder is None else load_base(base_spec(folder, bits=4))
    while len(model.model.layers) < LAYERS:
        model.model.layers.append(copy.deepcopy(model.model.layers[1]))
    model.config.num_hidden_layers = LAYERS
    network = attach(model, AdapterSpec(trains="adapter", rank=4, alpha=8.0, target_modules=["q_proj", "down_proj"]))
    if folder is None:
        network.to(dtype)
    randomize(network)
    return network


def pairs(seed: int, *sizes: tuple[int, int, int]) -> MicroBatch:
    generator = np.random.default_rng(seed)
    samples = []
    for prompt, chosen, rejected in sizes:
        size = prompt + chosen + rejected
        ids = generator.integers(0, VOCABULARY, size)
        samples.append(Sample(ids, np.arange(size) >= prompt, (prompt, prompt + chosen)))
    return pack(samples)


def documents(seed: int, *sizes: int) -> MicroBatch:
    generator = np.random.default_rng(seed)
    return pack([(generator.integers(0, VOCABULARY, size), np.arange(size) > 0) for size in sizes])


# Two lengths each of what shares prompts and of what does not.
MICROS = [pairs(0, (5, 7, 4), (9, 3, 6)), documents(1, 9, 4, 6), pairs(2, (4, 8, 2), (6, 5, 9)), documents(3, 12, 5)]


def compiling_with(
    backend: str | Callable[..., Any], *, dynamic: bool = True
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile as the product does; not ``dynamic`` where one shape is all there is: half the time to trace."""
    return lambda step: torch.compile(step, dynamic=dynamic, backend=backend)
