"""Causal attention over sequences laid end to end, without padding and without a mask tensor."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from fine_tune.kernels.capability import is_ampere
from fine_tune.kernels.segment_attention import segment_attention
from fine_tune.kernels.shared_rows import gather_rows
from fine_tune.packing.segments import Segments

PACKED = "packed"
UNSUPPORTED = {
    "softcap": "soft-capped attention logits",
    "s_aux": "attention sinks",
}


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each sequence; registered with transformers' ``AttentionInterface`` as ``packed``.

    A sequence that continues a shared prefix sees that prefix's keys and values, which exist once: the completions of a
    preference pair share their prompt (Krishna et al. 2024, arXiv:2410.20305).

    Shapes: ``query [1, Hq, T, D]``, ``key`` and ``value`` ``[1, Hkv, T, D]``; returns ``[1, T, Hq, D]``. The segments
    arrive as the model call's keyword ``segments``.

    Raises:
        ValueError: No segments, a mask, or a feature that this attention does not compute (named).
    """
    segments: Segments | None = kwargs.get("segments")
    if segments is None or attention_mask is not None or query.shape[0] != 1:
        raise ValueError("packed attention needs segments=Segments(...), one row and no attention mask.")
    refuse_unsupported(module, kwargs, "packed")
    window = kwargs.get("sliding_window")
    window = window if window is not None and window < segments.max_keys else None
    scale = kwargs.get("scaling")
    dtype = _compute_dtype(value)
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    attend = _varlen if has_varlen(value) else _opaque if torch.compiler.is_compiling() else _bucketed
    return attend(q, k, v, segments=segments, scale=scale, window=window).unsqueeze(0), None


def _compute_dtype(value: Tensor) -> torch.dtype:
    """The dtype that products are to be computed in.

    Under autocast rotary embeddings leave queries and keys in float32, and values too where the model is stored in it.
    """
    if torch.is_autocast_enabled(value.device.type) and value.dtype == torch.float32:
        return torch.get_autocast_dtype(value.device.type)
    return value.dtype


def refuse_unsupported(module: nn.Module, options: Mapping[str, Any], ours: str) -> None:
    """Refuse an attention option that no attention of ours computes.

    Raises:
        ValueError: It is set (named).
    """
    for name, meaning in UNSUPPORTED.items():
        if options.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} uses {meaning} ({name}), which {ours} attention does not compute."
            )


def has_varlen(value: Tensor) -> bool:
    """Tell whether torch's variable-length flash kernel covers these tensors: sm80 or newer, half precision."""
    if not value.is_cuda or value.dtype not in (torch.float16, torch.bfloat16):
        return False
    return is_ampere(value.device) and _varlen_parameters() is not None


@functools.cache
def _varlen_parameters() -> frozenset[str] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return frozenset(inspect.signature(varlen_attn).parameters)


def _varlen(q: Tensor, k: Tensor, v: Tensor, *, segments: Segments, scale: float | None, window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    known = _varlen_parameters() or frozenset()
    # torch 2.10 says is_causal; 2.11 on, a right window of 0 means causal; 2.12 on, grouped heads must be announced.
    options: dict[str, Any] = {"scale": scale} if "scale" in known else {}
    if "window_size" in known:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None:
        options["is_causal"] = True
    else:
        raise ValueError(
            f"sliding_window={window}: torch {torch.__version__} has no windowed varlen_attn. Use torch>=2.11."
        )
    if "enable_gqa" in known and q.shape[1] != k.shape[1]:
        options["enable_gqa"] = True
    if segments.key_index is not None and segments.key_uses is not None:
        k, v = (gather_rows(x, segments.key_index, segments.key_uses) for x in (k, v))
    # Causal means aligned at the end: the last query of a sequence sees all of its keys.
    out = varlen_attn(q, k, v, segments.cu_seqlens, segments.cu_keys, *segments.bounds, **options)
    assert isinstance(out, Tensor), "a tuple only comes when the log-sum-exp is asked for"
    return out


def _opaque(q: Tensor, k: Tensor, v: Tensor, *, segments: Segments, scale: float | None, window: int | None) -> Tensor:
    """Inside a compiled layer there may be no break: the plain way as one operation."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    parts = (segments.cu_seqlens, segments.cu_keys, segments.key_index)
    out: Tensor = segment_attention(q, k, v, *parts, scale, window or 0)
    return out


def _bucketed(
    q: Tensor, k: Tensor, v: Tensor, *, segments: Segments, scale: float | None, window: int | None
) -> Tensor:
    """Batch segments of similar length; right padding is invisible to causal attention, so no mask is needed."""
    out = torch.zeros_like(q)
    if _repeats_heads(q):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    for gather, slots, tokens in segments.buckets():
        mask = None if window is None else _band(gather.shape[1], window, q.device)
        rows = F.scaled_dot_product_attention(
            q[gather].transpose(1, 2),
            k[gather].transpose(1, 2),
            v[gather].transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        out = out.index_copy(0, tokens, rows.transpose(1, 2).flatten(0, 1)[slots])
    return out


def _repeats_heads(q: Tensor) -> bool:
    """On GPUs without flash attention torch's kernel for little memory knows no grouped heads; the other keeps squares."""
    return q.is_cuda


def _band(width: int, window: int, device: torch.device) -> Tensor:
    distance = torch.arange(width, device=device)[:, None] - torch.arange(width, device=device)[None, :]
    return (distance >= 0) & (distance < window)


def register() -> None:
    """Make ``attn_implementation="packed"`` known to transformers. No mask function is registered: the mask is None."""
    AttentionInterface.register(PACKED, packed_attention)
