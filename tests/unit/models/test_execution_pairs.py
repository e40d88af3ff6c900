"""A preference step on compiled layers: one set of graphs for policy and reference, and an exact start."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fine_tune.models import execution
from fine_tune.models.adapter import trainable
from fine_tune.models.execution import prepare_layers
from fine_tune.models.forward import supervised_logps
from fine_tune.modules.dpo import DPOModule
from fine_tune.modules.optim import OptimSpec
from fine_tune.modules.ratios import Ratios
from fine_tune.modules.reference import FrozenAdapter, snapshot
from fine_tune.packing.batches import MicroBatch, StepBatch
from fine_tune.speed import SPEEDS

from .layered_policy import MICROS, compiling_with, pairs, policy

pytestmark = [
    # torch 2.13's own tracing asks itself for what it deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # Dynamo looks whether the norm's input has a gradient, and hides what torch says to that.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
ADAMW = OptimSpec(torch.optim.AdamW, lr=1e-2, schedule="constant", warmup_share=0.0, max_grad_norm=None)


class Prepared(NamedTuple):
    """A network that compiles, and what counts its graphs."""

    network: nn.Module
    compiler: CompileCounterWithBackend


def module_of(network: nn.Module, reference: FrozenAdapter | None = None) -> DPOModule:
    frozen = reference or FrozenAdapter(network, snapshot(network))
    return DPOModule(network, reference=frozen, optim=ADAMW, num_steps=1)


def step(module: DPOModule, micro: MicroBatch) -> tuple[float, dict[str, float], Tensor]:
    module.network.zero_grad()
    ratios = Ratios(module.metric_names, module.device)
    batch = StepBatch(0, 0, [micro], len(micro.rows), len(micro.samples), micro.num_tokens)
    loss = module.micro_loss(micro, batch, ratios)
    loss.backward()
    gradients = [p.grad.flatten() for p in trainable(module.network).values() if p.grad is not None]
    return loss.item(), ratios.means(), torch.cat(gradients)


def moved(network: nn.Module) -> FrozenAdapter:
    return FrozenAdapter(network, {name: value * 1.5 for name, value in snapshot(network).items()})


def prepared(*, dynamic: bool) -> Prepared:
    """A network in float32, as a user's is."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    network = policy(torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "compiled", compiling_with(counter, dynamic=dynamic))
        prepare_layers(network, SPEEDS["balanced"])
    return Prepared(network, counter)


@pytest.fixture(scope="module")
def balanced() -> Iterator[Prepared]:
    """One network for all drills of a preference step: tracing takes seconds."""
    yield prepared(dynamic=True)
    torch._dynamo.reset()


@pytest.mark.drill
def test_policy_and_reference_take_the_same_graphs(balanced: Prepared) -> None:
    module = module_of(balanced.network)
    module.reference_logps(MICROS[0])
    traced = balanced.compiler.frame_count
    assert 2 <= traced <= 3
    supervised_logps(balanced.network, MICROS[0])
    assert balanced.compiler.frame_count == traced, "the policy's pass, which came second, compiles nothing"
    for seed in (1, 2, 3):
        step(module, pairs(seed, (3 + seed, 8, 2), (6, 4 + seed, 9)))
    assert balanced.compiler.frame_count == traced, "nor do other lengths"


@pytest.mark.drill
def test_a_compiled_start_is_ln_2_and_not_nearly(balanced: Prepared) -> None:
    loss, metrics, _ = step(module_of(balanced.network), MICROS[0])
    assert abs(loss - math.log(2)) <= 1e-12
    assert metrics["rewards/chosen"] == metrics["rewards/rejected"] == 0.0


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.drill)])
def test_a_compiled_preference_step_is_the_plain_one(dynamic: bool) -> None:
    """With a reference that the policy is not: values are read when a graph runs, and not kept in it."""
    balanced = prepared(dynamic=dynamic)
    eager = policy(torch.float32)
    loss, metrics, gradient = step(module_of(eager, moved(eager)), MICROS[0])
    found, seen, slope = step(module_of(balanced.network, moved(balanced.network)), MICROS[0])
    assert found == pytest.approx(loss, abs=1e-5)
    assert seen == pytest.approx(metrics, abs=1e-4)
    assert (slope - gradient).norm() <= 1e-5 * gradient.norm()
    assert abs(metrics["rewards/margins"]) > 1e-4
    assert balanced.compiler.frame_count > 0
    torch._dynamo.reset()


@pytest.mark.drill
def test_a_reference_that_asks_for_no_gradient_would_be_other_graphs(balanced: Prepared) -> None:
    """The control, and the reason why frozen values ask for gradients that nobody takes."""
    module = module_of(balanced.network)
    module.reference_logps(MICROS[0])
    before = balanced.compiler.frame_count
    for _, _, tensor in module.reference._slots:
        tensor.requires_grad_(False)
    module.reference_logps(MICROS[0])
    assert balanced.compiler.frame_count > before
