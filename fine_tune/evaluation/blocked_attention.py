"""Causal attention for scoring on CPUs: in blocks of queries without the keys behind them, and only where it is read."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from fine_tune.models.attention import refuse_unsupported

BLOCKED = "blocked"
# Torch's CPU kernel leaves hidden keys out by 512 and hides the others after they were computed; blocks leave out nearly all.
BLOCK_QUERIES = 64
# Masks are cut out of tables whose widths are multiples of this.
TABLE_KEYS = 1024
# Its product with the values is slower for narrower heads than for these; added zeros change no sum. Over thousands of keys
# the two products round differently by up to 1e-4 nats, so long rows keep what every other implementation does.
MIN_WIDTH, MAX_WIDENED_KEYS = 16, 2048


class Places(NamedTuple):
    """States that are read after the last layer: row and position among the row's new tokens, ``[N]`` each."""

    rows: Tensor
    positions: Tensor


def blocked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend causally; registered with transformers' ``AttentionInterface`` as ``blocked``.

    The last query sees the last key. Rows may be padded on the right, where no real token looks.

    Shapes: ``query [B, Hq, T, D]``, ``key`` and ``value`` ``[B, Hkv, S, D]`` with S >= T; returns ``[B, T, Hq, D]``.
    ``places`` arrives as a keyword of the model call: in the last layer all other outputs are zero.

    Raises:
        ValueError: A mask, or a feature that this attention does not compute (named).
    """
    if attention_mask is not None:
        raise ValueError("blocked attention takes no attention mask.")
    refuse_unsupported(module, kwargs, "blocked")
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # Under autocast rotary embeddings leave queries and keys in float32; the values say what is computed in.
    q, k, v = (_widened(x.to(value.dtype), key.shape[2]) for x in (query, key, value))
    places: Places | None = kwargs.get("places")
    options: dict[str, Any] = {"window": kwargs.get("sliding_window"), "scale": scale}
    # What is not read of the last layer is read nowhere.
    at = places if _is_last(module) else None
    out = _attend(q, k, v, **options) if at is None else _attend_at(at, q, k, v, **options)
    return out[..., : value.shape[-1]].transpose(1, 2), None


def _widened(heads: Tensor, keys: int) -> Tensor:
    missing = MIN_WIDTH - heads.shape[-1]
    return F.pad(heads, (0, missing)) if missing > 0 and keys <= MAX_WIDENED_KEYS else heads


def _is_last(module: nn.Module) -> bool:
    config: Any = module.config
    return bool(module.layer_idx == config.num_hidden_layers - 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float) -> Tensor:
    length, past = q.shape[2], k.shape[2] - q.shape[2]
    blocks = []
    for start in range(0, length, BLOCK_QUERIES):
        stop = min(length, start + BLOCK_QUERIES)
        keys = slice(0 if window is None else max(0, past + start - window + 1), past + stop)
        mask = _mask(stop - start, past + start - keys.start, window, q)
        blocks.append(_product(q[:, :, start:stop], k[:, :, keys], v[:, :, keys], mask, scale))
    return torch.cat(blocks, dim=2)


def _attend_at(places: Places, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float) -> Tensor:
    rows, positions = places
    at = positions + k.shape[2] - q.shape[2]
    mask = _hidden(at[:, None] - torch.arange(k.shape[2], device=k.device), window, q.dtype)[:, None, None]
    found = _product(q[rows, :, positions][:, :, None], k[rows], v[rows], mask, scale)
    out = torch.zeros_like(q)
    out[rows, :, positions] = found[:, :, 0]
    return out


def _mask(queries: int, behind: int, window: int | None, like: Tensor) -> Tensor:
    """Hide what a block of queries may not see, the first of which has so many keys behind it."""
    width = -(-behind // TABLE_KEYS) * TABLE_KEYS
    return _table(width, window, like.dtype, like.device)[:queries, width - behind : width + queries]


@functools.lru_cache(maxsize=16)
def _table(width: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make the mask of a whole block with ``width`` keys behind it: every layer of every pass needs the same."""
    queries = torch.arange(BLOCK_QUERIES, device=device)
    return _hidden(queries[:, None] - torch.arange(-width, BLOCK_QUERIES, device=device), window, dtype)


def _hidden(distance: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """Turn how far keys lie behind queries into what is added to their scores."""
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(distance.shape, dtype=dtype, device=distance.device).masked_fill_(hidden, float("-inf"))


def _product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def register() -> None:
    """Make ``attn_implementation="blocked"`` known to transformers. No mask function is registered: the mask is None."""
    AttentionInterface.register(BLOCKED, blocked_attention)
