"""What the properties are drawn from, and the independent way: one plain sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fine_tune.models import attention
from fine_tune.models.adapter import causal_lm
from fine_tune.packing.batches import Sample

from ..unit.models.conftest import VOCABULARY

Row = tuple[np.ndarray, np.ndarray]
LENGTHS = st.lists(st.integers(2, 14), min_size=2, max_size=6)
SEEDS = st.integers(0, 99)
TOLERANCE = 1e-9  # relative, float64 with an exact norm; rounding stays near 1e-15


def plain(examples: int) -> settings:
    """The same examples in every run, without a clock; fixtures hold nothing that an example changes.

    Examples are small as they are: looking for a smaller one would take minutes of models.
    """
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    phases = (Phase.explicit, Phase.generate)
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=quiet, phases=phases)


def rows_of(lengths: Sequence[int], seed: int = 0) -> list[Row]:
    """Random tokens, about half of them supervised: the last one always, the first one never."""
    generator = np.random.default_rng([seed, *lengths])
    found = []
    for length in lengths:
        mask = generator.random(length) < 0.5
        mask[0], mask[-1] = False, True
        found.append((generator.integers(0, VOCABULARY, length), mask))
    return found


def pair_of(prompt: int, chosen: int, rejected: int, seed: int = 0) -> Sample:
    """A preference pair of random tokens, the prompt once."""
    ids = np.random.default_rng([seed, prompt, chosen, rejected]).integers(0, VOCABULARY, prompt + chosen + rejected)
    return Sample(ids, np.arange(len(ids)) >= prompt, (prompt, prompt + chosen))


def own_logits(network: nn.Module, ids: Tensor, **options: Tensor) -> Tensor:
    """Logits of the model's own forward pass with torch's attention, ``[R, T, V]``; no packing, no chunks."""
    model = causal_lm(network)
    # Not "eager", whose softmax runs in float32 whatever the model's dtype.
    model.set_attn_implementation("sdpa")
    try:
        logits: Tensor = network(input_ids=ids, use_cache=False, **options).logits
    finally:
        model.set_attn_implementation(attention.PACKED)
    return logits


def alone(network: nn.Module, ids: np.ndarray, mask: np.ndarray) -> Tensor:
    """Log-probabilities of one row's supervised tokens, each read from the logits of the token before it."""
    tokens = torch.from_numpy(ids)
    logits = own_logits(network, tokens[None])[0]
    places = [t for t in range(1, len(ids)) if mask[t]]
    return torch.stack([logits[t - 1, tokens[t]] - logits[t - 1].logsumexp(-1) for t in places])
