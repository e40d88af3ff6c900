"""Causal attention over segments as one opaque operation with a backward pass of its own, in plain torch operations.

It stands in inside compiled graphs where torch's variable-length kernel does not serve (CPU, float32, older cards); elsewhere
nothing calls it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Segment(NamedTuple):
    """Query rows ``[start, end)`` of one segment and the rows of its keys."""

    queries: slice
    keys: Tensor


def _segments(cu_seqlens: Tensor, cu_keys: Tensor, key_index: Tensor | None) -> Iterator[_Segment]:
    ends, key_ends = cu_seqlens.tolist(), cu_keys.tolist()
    for i in range(len(ends) - 1):
        if ends[i + 1] == ends[i]:
            continue
        rows = torch.arange(key_ends[i], key_ends[i + 1], device=cu_seqlens.device)
        yield _Segment(slice(ends[i], ends[i + 1]), rows if key_index is None else key_index[rows])


def _probabilities(q: Tensor, k: Tensor, scale: float, window: int) -> Tensor:
    """Softmax of the scores, ``[H, Tq, Tk]``, in float32 or wider; the last query sees the last key."""
    scores = (q @ k.transpose(1, 2)) * scale
    queries, keys = q.shape[1], k.shape[1]
    distance = torch.arange(keys - queries, keys, device=q.device)[:, None] - torch.arange(keys, device=q.device)
    hidden = (distance < 0) | (distance >= window) if window else distance < 0
    return scores.masked_fill(hidden, -math.inf).softmax(-1)


def _heads(x: Tensor, rows: slice | Tensor, repeats: int = 1) -> Tensor:
    """Rows ``[T, H, D]`` as ``[H * repeats, T, D]`` in float32 or wider."""
    wide = x[rows].transpose(0, 1).to(torch.promote_types(x.dtype, torch.float32))
    return wide.repeat_interleave(repeats, 0) if repeats > 1 else wide


@torch.library.custom_op("fine_tune::segment_attention", mutates_args=())
def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_keys: Tensor, key_index: Tensor | None, scale: float, window: int
) -> Tensor:
    """Attend causally within each segment; arguments as in ``Segments``, ``window`` 0 for none.

    Shapes: q ``[T, Hq, D]``, k and v ``[T, Hkv, D]``; the result is ``[T, Hq, D]``.
    """
    # Laid out as the fake below says, whatever the queries' own layout: head by head where a part of each head is rotated.
    out, repeats = torch.zeros_like(q, memory_format=torch.contiguous_format), q.shape[1] // k.shape[1]
    for segment in _segments(cu_seqlens, cu_keys, key_index):
        keys, values = (_heads(x, segment.keys, repeats) for x in (k, v))
        weights = _probabilities(_heads(q, segment.queries), keys, scale, window)
        out[segment.queries] = (weights @ values).transpose(0, 1).to(q.dtype)
    return out


@segment_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_keys: Tensor, key_index: Tensor | None, scale: float, window: int
) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("fine_tune::segment_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_keys: Tensor, key_index: Tensor | None,
    scale: float, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # Dao et al. 2022 (arXiv:2205.14135), appendix B.2.
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    repeats = q.shape[1] // k.shape[1]
    for segment in _segments(cu_seqlens, cu_keys, key_index):
        queries, d_out = _heads(q, segment.queries), _heads(grad, segment.queries)
        keys, values = (_heads(x, segment.keys, repeats) for x in (k, v))
        weights = _probabilities(queries, keys, scale, window)
        d_weights = d_out @ values.transpose(1, 2)
        d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdim=True)) * scale
        dq[segment.queries] = (d_scores @ keys).transpose(0, 1)
        for total, part in ((dk, d_scores.transpose(1, 2) @ queries), (dv, weights.transpose(1, 2) @ d_out)):
            grouped = part.unflatten(0, (-1, repeats)).sum(1)
            total.index_add_(0, segment.keys, grouped.transpose(0, 1))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_keys: Tensor, key_index: Tensor | None,
    scale: float, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, cu_seqlens, cu_keys, key_index, ctx.scale, ctx.window = inputs
    ctx.shares = key_index is not None
    ctx.save_for_backward(q, k, v, cu_seqlens, cu_keys, *([key_index] if ctx.shares else []))


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    q, k, v, cu_seqlens, cu_keys, *index = ctx.saved_tensors
    key_index = index[0] if ctx.shares else None
    grads = _attention_backward(grad, q, k, v, cu_seqlens, cu_keys, key_index, ctx.scale, ctx.window)
    return (*grads, None, None, None, None, None)


segment_attention.register_autograd(_backward, setup_context=_keep)
KEPT = (torch.ops.fine_tune.segment_attention.default,)
