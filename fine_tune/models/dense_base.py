"""A 4-bit base made dense once: the values that it would be multiplied as, without making them anew in every layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fine_tune.kernels.frozen_weight import FrozenWeight, dense


def make_dense(network: nn.Module, dtype: torch.dtype) -> int:
    """Replace every 4-bit layer by a plain one whose weight is the dequantised one in ``dtype``; returns how many.

    Call before an adapter is attached. What the model computes in ``dtype`` is the same; it takes the memory of dense weights.
    """
    found = [
        (parent, name, child)
        for parent in network.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and getattr(child.weight, "quant_state", None) is not None
    ]
    for parent, name, child in found:
        setattr(parent, name, _plain(child, dtype))
    if found:
        # PEFT and transformers ask the model, not its layers.
        _forget_quantisation(network)
    return len(found)


def _plain(layer: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    frozen = FrozenWeight.of(layer.weight)
    if frozen is None:
        kind = type(layer.weight).__name__
        raise TypeError(f"a weight of kind {kind} has no dense form here.")
    shape = (layer.out_features, layer.in_features)
    with torch.device("meta"):
        made = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=dtype)
    made.weight = nn.Parameter(dense(list(frozen.parts), frozen.layout, shape, dtype), requires_grad=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    return made.train(layer.training)


def _forget_quantisation(network: Any) -> None:
    for name in ("is_loaded_in_4bit", "is_quantized"):
        if hasattr(network, name):
            setattr(network, name, False)
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(network, name):
            setattr(network, name, None)
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config
