"""LoRA layers of PEFT, and 4-bit layers without one, that compute with one operation of ours where it covers them.

Elsewhere they compute as PEFT and bitsandbytes do.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn

from fine_tune.kernels.frozen_linear import frozen_linear
from fine_tune.kernels.frozen_weight import DENSE, FrozenWeight
from fine_tune.kernels.lora import lora_linear

# Measured on an H100 with a 4-bit weight of 4,096 x 11,008 and an adapter: theirs 229 us and ours 386 at 512 rows, 1,524 and 1,285
# at 8,192.
FEW_ROWS = 2048


class _Fused:
    """Mixed into a LoRA layer of PEFT; ``_frozen`` is its base weight."""

    _frozen: FrozenWeight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        few = self._frozen.layout != DENSE and _has_few_rows(x)
        if args or kwargs or few or not _covers(layer, x):
            found: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return found
        name = layer.active_adapters[0]
        base = layer.base_layer
        computed = x.to(_compute_dtype(base, x))
        y = lora_linear(
            computed,
            self._frozen,
            layer.lora_A[name].weight,
            layer.lora_B[name].weight,
            scale=float(layer.scaling[name]),
            bias=base.bias,
            dropped=layer.lora_dropout[name](computed) if _drops(layer, name) else None,
        )
        # As the layers that it stands for: 4-bit ones answer in the dtype they are asked in.
        return y.to(x.dtype) if hasattr(base, "compute_dtype") else y


class FusedLinear(_Fused, Linear):
    """A dense layer with LoRA."""


class _Frozen:
    """Mixed into a 4-bit layer of bitsandbytes; ``_frozen`` is its weight."""

    _frozen: FrozenWeight

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self
        if _has_few_rows(x) or self._frozen.parts[0] is not layer.weight:
            found: Tensor = super().forward(x)  # type: ignore[misc]
            return found
        dtype = x.dtype if layer.compute_dtype is None else layer.compute_dtype
        return frozen_linear(x.to(dtype), self._frozen, layer.out_features, bias=layer.bias).to(x.dtype)


def fuse_frozen(network: nn.Module) -> int:
    """Let every 4-bit layer take our operation in training, those inside LoRA layers as well; returns how many do."""
    if (kind := _frozen_kind()) is None:
        return 0
    plain, ours = kind
    fused = 0
    for module in network.modules():
        frozen = FrozenWeight.of(module.weight) if type(module) is plain else None
        if frozen is not None and frozen.layout != DENSE:
            module.__class__ = ours
            module._frozen = frozen  # type: ignore[assignment]
            fused += 1
    return fused


def fuse(network: nn.Module) -> int:
    """Let every LoRA layer that can take our operation take it; returns how many can.

    A layer decides anew in each call: with several adapters, DoRA, a merged or switched-off adapter it computes as
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
    """Tell whether every adapted layer takes our operation in training, where DoRA leaves it to PEFT."""
    layers: list[Any] = [module for module in network.modules() if isinstance(module, LoraLayer)]
    fused = bool(layers) and all(isinstance(layer, _Fused) for layer in layers)
    return fused and not any(layer.lora_variant for layer in layers)


@functools.cache
def _quantised_kind() -> tuple[type, type] | None:
    try:
        from peft.tuners.lora.bnb import Linear4bit
    except ImportError:
        return None
    return Linear4bit, type("FusedLinear4bit", (_Fused, Linear4bit), {"__doc__": "A 4-bit layer with LoRA."})


@functools.cache
def _frozen_kind() -> tuple[type, type] | None:
    try:
        from bitsandbytes.nn.modules import Linear4bit
    except ImportError:
        return None
    return Linear4bit, type("FrozenLinear4bit", (_Frozen, Linear4bit), {"__doc__": "A 4-bit layer that does not train."})


def _has_few_rows(x: Tensor) -> bool:
    """Tell whether a pass without a backward has so few rows that bitsandbytes' own kernels for them are faster."""
    return not (torch.is_grad_enabled() and x.requires_grad) and x.numel() < FEW_ROWS * x.shape[-1]


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
    return _compute_dtype(layer.base_layer, x).is_floating_point


def _drops(layer: Any, name: str) -> bool:
    """Tell whether the adapter reads another input than the weight does."""
    return bool(layer.training) and getattr(layer.lora_dropout[name], "p", 0.0) > 0


def _compute_dtype(base: nn.Linear, x: Tensor) -> torch.dtype:
    """The dtype that the base layer would multiply in."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    stated = getattr(base, "compute_dtype", None)
    return stated if isinstance(stated, torch.dtype) else base.weight.dtype
