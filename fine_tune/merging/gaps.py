"""How far apart two models' logits are, on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def gap(reference: Iterable[Tensor], other: Iterable[Tensor]) -> dict[str, Any]:
    """Compare logits position by position.

    Args:
        reference: Logits ``[T, V]`` per prompt, float32.
        other: Those of the other model.

    Returns:
        ``max_logit_gap`` and ``mean_logit_gap`` (absolute), ``kl`` and ``max_kl`` of the next-token distributions (nats, reference
        against other), ``top1_agreement`` (share of positions), ``num_positions``. Infinite where a logit is not finite.

    Example:
        >>> one = torch.tensor([[0.0, math.log(3.0)]])
        >>> found = gap([one], [torch.tensor([[0.5, math.log(3.0)]])])
        >>> found["max_logit_gap"], found["top1_agreement"], found["num_positions"]
        (0.5, 1.0, 1)
    """
    gaps, means, divergences, agreed = [0.0], [], [], 0
    for ours, theirs in zip(reference, other, strict=True):
        if ours.shape != theirs.shape:
            raise ValueError(f"logits {tuple(ours.shape)} against {tuple(theirs.shape)}")
        difference = (ours - theirs).abs()
        gaps.append(_finite(difference.max()))
        means.append(difference.mean(-1).double())
        left, right = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
        # Rounding can leave a tiny negative sum where two distributions are the same.
        divergences.append((left.exp() * (left - right)).sum(-1).clamp(min=0))
        agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    mean, kl = torch.cat(means), torch.cat(divergences)
    return {
        "max_logit_gap": max(gaps),
        "mean_logit_gap": _finite(mean.mean()),
        "kl": _finite(kl.mean()),
        "max_kl": _finite(kl.max()),
        "top1_agreement": agreed / len(mean),
        "num_positions": len(mean),
    }


def _finite(value: Tensor) -> float:
    found = float(value)
    return found if math.isfinite(found) else math.inf
