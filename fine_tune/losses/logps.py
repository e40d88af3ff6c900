"""Per-token log-probabilities from hidden states, without ever holding a [tokens, vocabulary] tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Logits that exist at a time, whatever the vocabulary: 1,048 rows of 32,000 words, 220 of 152,000.
MOST_LOGITS = 1 << 25
# Fewer rows than these would leave the product with the head's weight waiting for that weight.
FEWEST_ROWS = 64


def token_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, chunk_tokens: int = 1024
) -> Tensor:
    """Score each target token under the output head, a chunk of rows at a time.

    Shapes: N rows, H hidden size, V vocabulary.

    Args:
        hidden: States that predict the targets, ``[N, H]``. Row n predicts ``targets[n]``: the
            shift by one position has already been made.
        weight: Head weight, ``[V, H]``. May be frozen or trained.
        targets: Token ids, ``[N]``, int64.
        bias: Head bias, ``[V]``, or None.
        chunk_tokens: Rows of logits that exist at a time, at most; fewer where the vocabulary is large.

    Returns:
        Natural-log probabilities, ``[N]``, in float32 or wider: the log-sum-exp never runs in half precision.

    Raises:
        ValueError: Shapes disagree, or ``chunk_tokens`` is not positive.

    Example:
        >>> import torch
        >>> token_logps(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 1])).exp()
        tensor([0.2500, 0.2500])

    Source: log-softmax and its gradient ``onehot - softmax`` (for example Bishop 2006, eq. 4.109);
    computing it in row chunks changes no sum, since rows are independent.
    """
    if hidden.shape[:1] != targets.shape or hidden.shape[1:] != weight.shape[1:]:
        raise ValueError(
            f"token_logps: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets "
            f"{tuple(targets.shape)} do not fit [N, H], [V, H], [N]."
        )
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens}: must be >= 1. Set objective.head_chunk_tokens.")
    compute = _compute_dtype(hidden)
    rows = rows_at_a_time(chunk_tokens, weight.shape[0])
    scores: Tensor = _ChunkedHead.apply(hidden, weight, bias, targets, rows, compute)  # type: ignore[no-untyped-call]
    return scores


def rows_at_a_time(chunk_tokens: int, vocabulary: int) -> int:
    """Return how many rows of logits exist at a time: ``chunk_tokens``, or what a large vocabulary leaves of them.

    Example:
        >>> rows_at_a_time(1024, 32_000), rows_at_a_time(1024, 152_064), rows_at_a_time(16, 152_064)
        (1024, 220, 16)
    """
    return min(chunk_tokens, max(FEWEST_ROWS, MOST_LOGITS // vocabulary))


def log_softmax_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the log-softmax of a few rows, ``[N, V]``, computed as :func:`token_logps` does but without a gradient."""
    compute = _compute_dtype(hidden)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        return _log_softmax(hidden, weight.to(compute), bias, compute)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    # float64 is never cast down: autocast leaves it alone for matmuls as well.
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype


class _ChunkedHead(torch.autograd.Function):
    """Row-chunked ``log_softmax(hidden @ weight.T + bias)[targets]``.

    A frozen head stores one hidden-sized row per token, the gradient of its log-probability, and the
    backward pass is a row scaling. A trained head recomputes its logits chunk by chunk instead.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int, compute: torch.dtype
    ) -> Tensor:
        ctx.chunk, ctx.compute = chunk, compute
        head_trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        keep_rows = ctx.needs_input_grad[0] and not head_trains
        logps = hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))
        slopes = torch.empty_like(hidden, dtype=compute) if keep_rows else None
        cast_weight = weight.to(compute)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], chunk):
                rows = slice(start, start + chunk)
                log_probs = _log_softmax(hidden[rows], cast_weight, bias, compute)
                logps[rows] = log_probs.gather(1, targets[rows, None]).squeeze(1)
                if slopes is not None:
                    slopes[rows] = _target_slope(log_probs, targets[rows]).to(compute) @ cast_weight
        if head_trains:
            ctx.save_for_backward(hidden, weight, bias, targets)
        elif slopes is not None:
            ctx.save_for_backward(slopes)
        ctx.head_trains = head_trains
        return logps

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.head_trains:
            (slopes,) = ctx.saved_tensors
            grad_hidden = slopes * grad_logps[:, None].to(slopes.dtype)
            return grad_hidden, None, None, None, None, None
        hidden, weight, bias, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=wide)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        cast_weight = weight.to(ctx.compute)
        for start in range(0, hidden.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            log_probs = _log_softmax(hidden[rows], cast_weight, bias, ctx.compute)
            slope = _target_slope(log_probs, targets[rows]) * grad_logps[rows, None]
            grad_hidden[rows] = (slope.to(ctx.compute) @ cast_weight).to(hidden.dtype)
            grad_weight += (slope.to(ctx.compute).T @ hidden[rows].to(ctx.compute)).to(wide)
            if grad_bias is not None:
                grad_bias += slope.sum(0).to(wide)
        bias_out = None if bias is None or grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), bias_out, None, None, None


def _log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, compute: torch.dtype) -> Tensor:
    logits = hidden.to(compute) @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        logits += bias.to(logits.dtype)
    logits -= torch.logsumexp(logits, dim=-1, keepdim=True)
    return logits


def _target_slope(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Turn log-probabilities in place into their target's gradient, ``onehot - softmax``."""
    slope = log_probs.exp_().neg_()
    slope.scatter_add_(1, targets[:, None], torch.ones_like(slope[:, :1]))
    return slope
