"""A tiny adapted model in float64, where equal means equal to a billionth."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fine_tune.models.adapter import AdapterSpec, attach

from ..unit.models.conftest import llama, randomize


def _norm(self: LlamaRMSNorm, states: Tensor) -> Tensor:
    return self.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.fixture(scope="module")
def exact_norm() -> Iterator[None]:
    """Keep transformers' norm in float64; it goes through float32 otherwise and rounds there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", _norm)
        yield


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """Two layers, an adapter on every linear layer, B not zero."""
    # Doubled before and after: adapters are attached in float32.
    found = attach(llama().double(), AdapterSpec(trains="adapter", rank=4, alpha=8.0)).double()
    randomize(found)
    return found
