"""What training left: low-rank pairs, magnitudes and token rows of an adapter, or every weight; each by the module it changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fine_tune.errors import CheckpointError
from fine_tune.models.adapter import AdapterSpec

PREFIX = "base_model.model."
# What a tensor's name ends in, and what it is.
ENDS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".token_adapter.trainable_tokens_delta": "rows",
}


@dataclass
class Update:
    """The change of one matrix.

    Attributes:
        a: ``[r, in]``.
        b: ``[out, r]``.
        magnitude: Of DoRA, ``[out]``.
        rows: Whole new rows of an embedding, ``[n, H]``, in the order of the spec's new tokens.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    magnitude: Tensor | None = None
    rows: Tensor | None = None


@dataclass
class Trained:
    """All changes.

    Attributes:
        updates: By module.
        whole: Tensors that replace the base's, by name.
        scaling: Of every low-rank product.
        new_tokens: The ids of trained rows.
    """

    updates: dict[str, Update] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    scaling: float = 1.0
    new_tokens: list[int] = field(default_factory=list)


def read_trained(state: Mapping[str, Tensor], spec: AdapterSpec, *, origin: str) -> Trained:
    """Sort a saved state by module.

    Raises:
        CheckpointError: It holds a tensor that cannot be merged, or half of a pair.
    """
    if spec.trains == "all":
        return Trained(whole=dict(state))
    found: dict[str, Update] = {}
    for name, tensor in state.items():
        end = next((end for end in ENDS if name.endswith(end)), None)
        if end is None or not name.startswith(PREFIX):
            raise CheckpointError(f"{origin}: {name} is no part of an adapter that can be merged.")
        module = name.removeprefix(PREFIX).removesuffix(end)
        setattr(found.setdefault(module, Update()), ENDS[end], tensor)
    for module, update in found.items():
        if (update.a is None) != (update.b is None) or (update.magnitude is None) != (
            not spec.use_dora or update.a is None
        ):
            raise CheckpointError(f"{origin}: the adapter of {module} is not complete. Use another checkpoint.")
    root = math.sqrt(spec.rank) if spec.rank_stabilized else spec.rank
    return Trained(found, {}, spec.alpha / root, list(spec.new_tokens))


def updated(weight: Tensor, update: Update, scaling: float) -> Tensor:
    """Return the weight that computes what base and adapter compute together, in float32.

    Args:
        weight: The base's, ``[out, in]``, float32.
        update: A low-rank pair, with DoRA's magnitude if there is one.
        scaling: Of the pair's product.

    Source: Hu et al. 2021 (arXiv:2106.09685), eq. 3; DoRA, Liu et al. 2024 (arXiv:2402.09353), eq. 5.
    """
    assert update.a is not None
    assert update.b is not None
    a, b = (part.to(weight.device, torch.float32) for part in (update.a, update.b))
    moved = weight + scaling * (b @ a)
    if update.magnitude is None:
        return moved
    norm = torch.linalg.norm(moved, dim=1, keepdim=True)
    whole: Tensor = moved * (update.magnitude.to(weight.device, torch.float32)[:, None] / norm)
    return whole
