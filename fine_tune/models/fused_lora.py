"""LoRA layers of PEFT that compute with one operation of ours where it covers them, and with PEFT's own code elsewhere."""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn

from fine_tune.kernels.frozen_weight import FrozenWeight
from fine_tune.kernels.lora import lora_linear


class _Fused:
    """Mixed into a LoRA layer of PEFT; ``_frozen`` is its base weight."""

    _frozen: FrozenWeight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        if args or kwargs or not _covers(layer, x):
            found: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return found
        name = layer.active_adapters[0]
        base = layer.base_layer
        y = lora_linear(
            x.to(_compute_dtype(base, x)),
            self._frozen,
            layer.lora_A[name].weight,
            layer.lora_B[name].weight,
            scale=float(layer.scaling[name]),
            bias=base.bias,
        )
        # As the layers that it stands for: 4-bit ones answer in the dtype they are asked in.
        return y.to(x.dtype) if hasattr(base, "compute_dtype") else y


class FusedLinear(_Fused, Linear):
    """A dense layer with LoRA."""


def fuse(network: nn.Module) -> int:
    """Let every LoRA layer that can take our operation take it; returns how many can.

    A layer decides anew in each call: with several adapters, dropout, DoRA, a merged or switched-off adapter it computes as
    PEFT does. Names, parameters and saved files stay as they are.
    """
    kinds: dict[type, type] = {Linear: FusedLinear}
    if (quantised := _quantised_kind()) is not None:
        kinds[quantised[0]] = quantised[1]
    fused = 0
    for module in network.modules():
        kind = kinds.get(type(module))
        if kind is None or not isinstance(module.base_layer, nn.Linear) or module.fan_in_fan_out:
            continue
        frozen = FrozenWeight.of(module.base_layer.weight)
        if frozen is not None:
            module.__class__ = kind
            module._frozen = frozen  # type: ignore[assignment]
            fused += 1
    return fused


def trains_fused(network: nn.Module) -> bool:
    """Tell whether every adapted layer takes our operation in training, where dropout and DoRA leave it to PEFT."""
    layers: list[Any] = [module for module in network.modules() if isinstance(module, LoraLayer)]
    fused = bool(layers) and all(isinstance(layer, _Fused) for layer in layers)
    drops = any(getattr(dropout, "p", 0.0) > 0 for layer in layers for dropout in layer.lora_dropout.values())
    return fused and not drops and not any(layer.lora_variant for layer in layers)


@functools.cache
def _quantised_kind() -> tuple[type, type] | None:
    try:
        from peft.tuners.lora.bnb import Linear4bit
    except ImportError:
        return None
    return Linear4bit, type("FusedLinear4bit", (_Fused, Linear4bit), {"__doc__": "A 4-bit layer with LoRA."})


def _covers(layer: Any, x: Tensor) -> bool:
    """Tell whether our operation computes what this layer would, as it is now."""
    names = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(names) != 1 or names[0] not in layer.lora_A:
        return False
    if layer._frozen.parts[0] is not layer.base_layer.weight:
        # Merging replaces a 4-bit weight, and taking the adapter out again does not bring the old one back.
        return False
    name = names[0]
    if name in layer.lora_variant or layer.lora_bias.get(name) or layer.base_layer.weight.requires_grad:
        return False
    dropout = layer.lora_dropout[name]
    drops = layer.training and getattr(dropout, "p", 0.0) > 0
    return not drops and _compute_dtype(layer.base_layer, x).is_floating_point


def _compute_dtype(base: nn.Linear, x: Tensor) -> torch.dtype:
    """The dtype that the base layer would multiply in."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    stated = getattr(base, "compute_dtype", None)
    return stated if isinstance(stated, torch.dtype) else base.weight.dtype
