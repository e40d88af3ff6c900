"""A linear layer whose weight is stored in 4 bits and does not train, as one opaque operation with its own backward pass.

``y = x W^T + bias`` (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 3). Making the weight dense for the backward pass
depends on nothing but the weight. As an operation of its own a compiler may do it as early as it likes, for several weights at a
time or in the forward pass; inside this one it is done where it is needed, and freed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fine_tune.kernels.frozen_weight import FrozenWeight, dense


@torch.library.custom_op("fine_tune::frozen_linear", mutates_args=())
def _linear(x: Tensor, frozen: list[Tensor], layout: str, out_features: int, bias: Tensor | None) -> Tensor:
    weight = dense(frozen, layout, (out_features, x.shape[1]), x.dtype)
    return x @ weight.t() if bias is None else torch.addmm(bias.to(x.dtype), x, weight.t())


@_linear.register_fake
def _(x: Tensor, frozen: list[Tensor], layout: str, out_features: int, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


@torch.library.custom_op("fine_tune::frozen_linear_backward", mutates_args=())
def _linear_backward(dy: Tensor, frozen: list[Tensor], layout: str, in_features: int) -> Tensor:
    return dy @ dense(frozen, layout, (dy.shape[1], in_features), dy.dtype)


@_linear_backward.register_fake
def _(dy: Tensor, frozen: list[Tensor], layout: str, in_features: int) -> Tensor:
    return dy.new_empty(dy.shape[0], in_features)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, frozen, ctx.layout, _, _ = inputs
    ctx.in_features = x.shape[1]
    ctx.save_for_backward(*frozen)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    frozen = list(ctx.saved_tensors)
    dx = _linear_backward(dy.contiguous(), frozen, ctx.layout, ctx.in_features)
    return dx, [None] * len(frozen), None, None, None


_linear.register_autograd(_backward, setup_context=_keep)


def frozen_linear(x: Tensor, weight: FrozenWeight, out_features: int, *, bias: Tensor | None = None) -> Tensor:
    """Return ``x W^T + bias`` with a gradient for x alone.

    Shapes: x ``[..., K]``, W ``[N, K]`` with N = ``out_features``, bias ``[N]``; the result is ``[..., N]`` in x's dtype, in which
    everything is computed.
    """
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = _linear(rows, list(weight.parts), weight.layout, out_features, bias)
    return y.view(*x.shape[:-1], out_features)


# What selective recomputation keeps: a product with the base's weights.
KEPT = (torch.ops.fine_tune.frozen_linear.default,)
