"""A weight as the base stores it: cast and quantised by the same operations as loading, and read back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fine_tune.kernels.frozen_weight import FrozenWeight, dense


def as_trained(weight: Tensor, dtype: torch.dtype, device: torch.device, quantised: Mapping[str, Any] | None) -> Tensor:
    """Return a weight as the base holds it once it is loaded, on ``device``, in float32 without loss.

    Args:
        weight: As the model's files hold it.
        dtype: What loading casts it to.
        device: Where it is quantised: devices round differently in rare cases.
        quantised: Settings of its quantised parameter, None where it is not quantised.
    """
    if not weight.is_floating_point():
        return weight
    cast = weight.to(device, dtype)
    return (cast if quantised is None else _read_back(cast, quantised)).float()


def _read_back(weight: Tensor, settings: Mapping[str, Any]) -> Tensor:
    import bitsandbytes

    # Its types are not what its functions take.
    bnb: Any = bitsandbytes
    if "quant_type" in settings:
        packed = bnb.nn.Params4bit(weight, requires_grad=False, **settings).to(weight.device)
        frozen = FrozenWeight.of(packed)
        assert frozen is not None
        # In float32 whatever the state says: products read the codes in their own dtype, and float32 holds them all.
        return dense(list(frozen.parts), frozen.layout, (weight.shape[0], weight.shape[1]), torch.float32)
    eight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(weight.device)
    codes: Tensor = bnb.functional.int8_vectorwise_dequant(eight.data, eight.SCB)
    return codes
