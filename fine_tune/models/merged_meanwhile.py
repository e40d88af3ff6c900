"""Adapters folded into dense weights for as long as a block lasts: what generating on a CPU is worth its memory for."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from fine_tune.kernels.frozen_weight import FrozenWeight, dense

# Beyond this (half a billion weights) the copies would crowd out what else a machine without a GPU does.
MOST_BYTES = 2e9


@contextmanager
def merged_meanwhile(network: nn.Module, *, most_bytes: float = MOST_BYTES) -> Iterator[int]:
    """Let each adapted linear layer multiply once, by ``W + scale * B A`` in float32; yields how many do.

    The same function up to rounding, in fewer and larger products: a 4-bit weight is dequantised once and not for every
    token. Layers are left as they are where it would not be the same (DoRA, several adapters, a LoRA bias), on other
    devices than the CPU, and altogether where the weights would take more than ``most_bytes``.

    Args:
        network: The model, in evaluation mode and without gradients; adapters that are switched off stay out.
        most_bytes: Memory that the weights may take.
    """
    layers: list[Any] = [layer for layer in network.modules() if isinstance(layer, LoraLayer) and _covered(layer)]
    size = sum(4 * layer.in_features * layer.out_features for layer in layers)
    # Under autocast the merged weight would be rounded, and small updates with it.
    chosen = layers if size <= most_bytes and not torch.is_autocast_enabled("cpu") else []
    try:
        for layer in chosen:
            layer.forward = functools.partial(_apply, _weight(layer), layer.base_layer.bias)
        yield len(chosen)
    finally:
        for layer in chosen:
            # What the class defines is found again.
            layer.__dict__.pop("forward", None)


def _apply(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


def _covered(layer: Any) -> bool:
    base = layer.base_layer
    if not isinstance(base, nn.Linear) or base.weight.device.type != "cpu" or getattr(layer, "fan_in_fan_out", False):
        return False
    if FrozenWeight.of(base.weight) is None or getattr(base, "compute_dtype", base.weight.dtype) not in (torch.float32, None):
        return False
    if base.bias is not None and base.bias.dtype != torch.float32:
        return False
    if layer.disable_adapters:
        return not layer.merged
    names = layer.active_adapters
    plain = len(names) == 1 and names[0] in layer.lora_A and not layer.merged
    return plain and not layer.use_dora.get(names[0], False) and layer.lora_B[names[0]].bias is None


@torch.no_grad()
def _weight(layer: Any) -> Tensor:
    frozen = FrozenWeight.of(layer.base_layer.weight)
    assert frozen is not None
    shape = (layer.base_layer.out_features, layer.base_layer.in_features)
    weight = dense(list(frozen.parts), frozen.layout, shape, torch.float32)
    if layer.disable_adapters:
        return weight
    name = layer.active_adapters[0]
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return torch.addmm(weight, b.float(), a.float(), alpha=float(layer.scaling[name]))
