"""A linear layer with a LoRA adapter as one opaque operation, with its own backward pass.

``y = x W^T + scale (x A^T) B^T + bias`` with a frozen W (Hu et al. 2021, arXiv:2106.09685, eq. 3). The weight is made dense
inside the operation, in the forward and again in the backward pass, so that nothing of its size is kept between them.
``x A^T`` is an operation of its own: what recomputes activations needs it, and not the product, of the last layer of a block.
With dropout the adapter reads another input than the weight does, and both operations have a backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fine_tune.kernels.frozen_weight import FrozenWeight, dense


@torch.library.custom_op("fine_tune::lora_inner", mutates_args=())
def _inner(x: Tensor, a: Tensor, scale: float) -> Tensor:
    return _scaled_product(x, a.to(x.dtype).t(), scale)


@_inner.register_fake
def _(x: Tensor, a: Tensor, scale: float) -> Tensor:
    return x.new_empty(x.shape[0], a.shape[0])


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Multiply and scale in one kernel; what is added to has no share in the result."""
    nothing = left.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(nothing, left, right, beta=0, alpha=scale)


def _product(x: Tensor, inner: Tensor, weight: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """Add both products and the bias, in the order that takes the least memory traffic."""
    up = b.to(x.dtype).t()
    if weight.shape[0] < weight.shape[1]:
        # Few outputs: adding the small product to them costs less than the large one loses by adding (measured on an H100).
        y = x @ weight.t() if bias is None else torch.addmm(bias.to(x.dtype), x, weight.t())
        return y.addmm_(inner, up)
    # The small product first: the large one adds to it on its way out.
    y = inner @ up if bias is None else torch.addmm(bias.to(x.dtype), inner, up)
    return y.addmm_(x, weight.t())


@torch.library.custom_op("fine_tune::lora_linear", mutates_args=())
def _linear(
    x: Tensor, inner: Tensor, frozen: list[Tensor], layout: str, a: Tensor, b: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    # ``inner`` is scaled already; the scale is here for the backward pass.
    return _product(x, inner, dense(frozen, layout, (b.shape[0], a.shape[1]), x.dtype), b, bias)


@_linear.register_fake
def _(
    x: Tensor, inner: Tensor, frozen: list[Tensor], layout: str, a: Tensor, b: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    return x.new_empty(x.shape[0], b.shape[0])


@torch.library.custom_op("fine_tune::lora_linear_backward", mutates_args=())
def _linear_backward(
    dy: Tensor, x: Tensor, inner: Tensor, frozen: list[Tensor], layout: str, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    d_inner = _scaled_product(dy, b.to(dy.dtype), scale)
    da = _wide_product(d_inner.t(), x, a.dtype)
    db = _wide_product(dy.t(), inner, b.dtype)
    dx = d_inner @ a.to(dy.dtype)
    return dx.addmm_(dy, dense(frozen, layout, (b.shape[0], a.shape[1]), dy.dtype)), da, db


@_linear_backward.register_fake
def _(
    dy: Tensor, x: Tensor, inner: Tensor, frozen: list[Tensor], layout: str, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(a), torch.empty_like(b)


def _wide_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply in half precision but keep the sum as wide as the gradient that it is: no rounding before the optimizer."""
    if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16) and dtype == torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).to(dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, inner, frozen, ctx.layout, a, b, _, ctx.scale = inputs
    ctx.save_for_backward(x, inner, a, b, *frozen)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, inner, a, b, *frozen = ctx.saved_tensors
    dx, da, db = _linear_backward(dy.contiguous(), x, inner, frozen, ctx.layout, a, b, ctx.scale)
    return dx, None, [None] * len(frozen), None, da, db, None, None


_linear.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("fine_tune::lora_inner_backward", mutates_args=())
def _inner_backward(dy: Tensor, x: Tensor, a: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scaled = dy * scale
    return scaled @ a.to(dy.dtype), _wide_product(scaled.t(), x, a.dtype)


@_inner_backward.register_fake
def _(dy: Tensor, x: Tensor, a: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(a)


def _keep_inner(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, a, ctx.scale = inputs
    ctx.save_for_backward(x, a)


def _backward_inner(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, a = ctx.saved_tensors
    return (*_inner_backward(dy.contiguous(), x, a, ctx.scale), None)


_inner.register_autograd(_backward_inner, setup_context=_keep_inner)


@torch.library.custom_op("fine_tune::lora_up", mutates_args=())
def _up(x: Tensor, inner: Tensor, frozen: list[Tensor], layout: str, b: Tensor, bias: Tensor | None) -> Tensor:
    return _product(x, inner, dense(frozen, layout, (b.shape[0], x.shape[1]), x.dtype), b, bias)


@_up.register_fake
def _(x: Tensor, inner: Tensor, frozen: list[Tensor], layout: str, b: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], b.shape[0])


@torch.library.custom_op("fine_tune::lora_up_backward", mutates_args=())
def _up_backward(
    dy: Tensor, inner: Tensor, frozen: list[Tensor], layout: str, in_features: int, b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    weight = dense(frozen, layout, (b.shape[0], in_features), dy.dtype)
    return dy @ weight, dy @ b.to(dy.dtype), _wide_product(dy.t(), inner, b.dtype)


@_up_backward.register_fake
def _(
    dy: Tensor, inner: Tensor, frozen: list[Tensor], layout: str, in_features: int, b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return dy.new_empty(dy.shape[0], in_features), torch.empty_like(inner), torch.empty_like(b)


def _keep_up(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, inner, frozen, ctx.layout, b, _ = inputs
    ctx.in_features = x.shape[1]
    ctx.save_for_backward(inner, b, *frozen)


def _backward_up(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    inner, b, *frozen = ctx.saved_tensors
    dx, d_inner, db = _up_backward(dy.contiguous(), inner, frozen, ctx.layout, ctx.in_features, b)
    return dx, d_inner, [None] * len(frozen), None, db, None


_up.register_autograd(_backward_up, setup_context=_keep_up)


def lora_linear(
    x: Tensor,
    weight: FrozenWeight,
    a: Tensor,
    b: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    dropped: Tensor | None = None,
) -> Tensor:
    """Return ``x W^T + scale (x A^T) B^T + bias`` with gradients for x, A and B; the rest is frozen.

    ``dropped`` is what the adapter reads in place of x, of which some values are dropped; it has a gradient of its own.

    Shapes: x ``[..., K]``, W ``[N, K]``, A ``[r, K]``, B ``[N, r]``, bias ``[N]``; the result is ``[..., N]`` in x's dtype, in
    which everything is computed. Gradients of A and B are sums in their own dtype.
    """
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor
    if dropped is None:
        # Its gradients are in those of the product.
        inner = _inner(rows.detach(), a.detach(), scale)
        y = _linear(rows, inner, list(weight.parts), weight.layout, a, b, bias, scale)
    else:
        inner = _inner(dropped.reshape(-1, x.shape[-1]), a, scale)
        y = _up(rows, inner, list(weight.parts), weight.layout, b, bias)
    return y.view(*x.shape[:-1], y.shape[-1])


# What selective recomputation keeps: products with the base's weights, and the small ones that their backward pass needs.
KEPT = tuple(getattr(torch.ops.fine_tune, name).default for name in ("lora_inner", "lora_linear", "lora_up"))
