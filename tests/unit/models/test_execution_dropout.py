"""With dropout, layers that compute again in the backward pass drop what they dropped in the forward pass."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fine_tune.models import execution
from fine_tune.models.adapter import AdapterSpec, attach, trainable
from fine_tune.models.execution import Execution, prepare_layers
from fine_tune.models.forward import supervised_logps
from fine_tune.models.fused_lora import trains_fused

from .conftest import llama, randomize
from .layered_policy import COMPILED, EAGER, LAYERS, MICROS, compiling_with

# Torch's own, about how it traces.
pytestmark = [
    pytest.mark.usefixtures("exact_norm"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # Dynamo looks whether the norm's input has a gradient, and hides what torch says to that.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
WAYS = {name: how for name, how in (EAGER | COMPILED).items() if how.fused_lora}


def dropping() -> nn.Module:
    model: Any = llama()
    while len(model.model.layers) < LAYERS:
        model.model.layers.append(copy.deepcopy(model.model.layers[1]))
    model.config.num_hidden_layers = LAYERS
    spec = AdapterSpec(trains="adapter", rank=4, alpha=8.0, dropout=0.3, target_modules=["q_proj", "down_proj"])
    network = attach(model, spec).double()
    randomize(network)
    return network.train()


def slopes(network: nn.Module, seed: int = 4) -> Tensor:
    network.zero_grad()
    torch.manual_seed(seed)
    (-supervised_logps(network, MICROS[0]).mean()).backward()
    return torch.cat([p.grad.flatten() for p in trainable(network).values() if p.grad is not None])


def gap(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def plain() -> Tensor:
    """Left to PEFT."""
    return slopes(dropping())


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs with their backward passes, taken as they are traced."""
    torch._dynamo.reset()
    monkeypatch.setattr(execution, "compiled", compiling_with("aot_eager", dynamic=False))
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.drill if WAYS[way].compile else ()) for way in WAYS]
)
def test_gradients_are_those_of_pefts_layers_with_the_same_draws(plain: Tensor, traced: None, way: str) -> None:
    network = dropping()
    prepare_layers(network, WAYS[way])
    assert trains_fused(network)
    assert gap(slopes(network), plain) < 1e-12
    # Control: other draws are another gradient.
    assert gap(slopes(network, seed=5), plain) > 1e-2


def loss(network: nn.Module, seed: int = 4) -> float:
    torch.manual_seed(seed)
    return float((-supervised_logps(network, MICROS[0]).mean()).detach())


@pytest.mark.drill
@pytest.mark.timeout(600)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_compiler_drops_the_same_in_both_passes(recompute: Any) -> None:
    """Its draws are its own, so the gradient is held against differences of its own loss (central, step 1e-6)."""
    torch._dynamo.reset()
    network = dropping()
    runs = prepare_layers(network, Execution(recompute, compile=True, fused_lora=True))
    found = slopes(network)
    along = torch.randn(found.shape, generator=torch.Generator().manual_seed(8), dtype=found.dtype)
    weights = [p for p in trainable(network).values() if p.grad is not None]
    ends = []
    for sign in (1.0, -2.0):
        with torch.no_grad():
            for weight, step in zip(weights, along.split([w.numel() for w in weights]), strict=True):
                weight += sign * 1e-6 * step.view(weight.shape)
        ends.append(loss(network))
    slope = (ends[0] - ends[1]) / 2e-6
    assert float(found @ along) == pytest.approx(slope, rel=1e-6)
    # Control: other draws have another slope.
    assert abs(float(slopes(network, seed=5) @ along) - slope) > 1e-3 * abs(slope)
    assert runs.compiles, "it was not given up"
    torch._dynamo.reset()
