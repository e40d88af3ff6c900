"""Passes that prove something and change nothing, and the bugs that they are there for."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fine_tune.checklist.passes import Passes, adapter_item, computed_reference, probe, without_dropout
from fine_tune.losses.sft import sft_loss
from fine_tune.models import attention
from fine_tune.models.adapter import AdapterSpec, attach, trainable
from fine_tune.models.forward import supervised_logps
from fine_tune.modules.optim import OptimSpec
from fine_tune.modules.ratios import Ratios
from fine_tune.modules.sft import SFTModule
from fine_tune.packing.batches import MicroBatch, StepBatch, pack
from fine_tune.packing.segments import Segments, Span

from ..models.conftest import VOCABULARY, llama, randomize
from ..modules.conftest import dpo, pairs, policy, step_of

SPEC = OptimSpec(torch.optim.AdamW, lr=1e-2, schedule="linear", warmup_share=0.0, max_grad_norm=None)


def rows(*lengths: int) -> MicroBatch:
    generator = np.random.default_rng(5)
    return pack([(generator.integers(0, VOCABULARY, n), np.arange(n) > n // 2) for n in lengths])


def batch_of(micro: MicroBatch) -> StepBatch:
    return StepBatch(0, 0, [micro], len(micro.rows), len(micro.samples), micro.num_tokens)


def module(kind: type[SFTModule] = SFTModule, *, dropout: float = 0.0, dora: bool = False) -> SFTModule:
    network = attach(llama(), AdapterSpec(trains="adapter", rank=4, alpha=8.0, dropout=dropout, use_dora=dora))
    randomize(network)
    return kind(network, optim=SPEC, num_steps=3)


def passes(of: Any) -> Passes:
    return Passes(of, nullcontext)


class MeanOfMeans(SFTModule):
    """The bug: every micro-batch is divided by its own count."""

    def micro_loss(self, micro: MicroBatch, batch: StepBatch, ratios: Ratios) -> Tensor:
        return sft_loss(supervised_logps(self.network, micro), num_step_tokens=len(micro.rows))


def test_a_step_divided_gives_the_same_gradient() -> None:
    micro = rows(9, 4, 12, 5, 7)
    of = module(dropout=0.3)
    item = passes(of).division(micro, batch_of(micro))
    assert item.passed is True, item.says
    assert item.says.startswith("5 rows at once and in 5 parts")
    assert all(parameter.grad is None for parameter in trainable(of.network).values())
    assert {m.p for m in of.network.modules() if isinstance(m, nn.Dropout)} == {0.3}


def test_a_mean_of_means_is_found() -> None:
    micro = rows(9, 4, 12, 5, 7)
    item = passes(module(MeanOfMeans)).division(micro, batch_of(micro))
    assert item.passed is False
    assert float(item.says.partition("gradients ")[2].split()[0]) > 0.1, "far past any rounding"


def test_a_neighbour_that_is_seen_is_found() -> None:
    """The bug: rows laid end to end are one sequence."""
    micro = rows(9, 4, 12, 5, 7)
    micro.segments = Segments.from_spans([Span(0, micro.num_tokens)])
    micro.position_ids = torch.arange(micro.num_tokens)[None]
    apart = rows(9, 4, 12, 5, 7)

    class Joined(SFTModule):
        def micro_loss(self, given: MicroBatch, batch: StepBatch, ratios: Ratios) -> Tensor:
            return super().micro_loss(micro if given is apart else given, batch, ratios)

    item = passes(module(Joined)).division(apart, batch_of(apart))
    assert item.passed is False


def test_a_single_row_cannot_be_divided() -> None:
    micro = rows(9)
    assert passes(module()).division(micro, batch_of(micro)).passed is None


def test_pairs_divide_too_and_leave_the_gate_as_it_was() -> None:
    of = dpo(policy(torch.float32))
    assert of.gate is not None
    micro = pairs(0, 1, 2)
    item = passes(of).division(micro, step_of(micro))
    assert item.passed is True, item.says
    assert of.gate._worst is None


def test_stored_reference_values_are_put_aside_and_back() -> None:
    of = dpo(policy())
    of.stored = torch.full((9, 2), torch.nan)
    stored = of.stored
    with computed_reference(of):
        assert of.stored is None
    assert of.stored is stored


def test_main_memory_is_not_judged() -> None:
    micro = rows(9, 4)
    assert passes(module()).fits(micro, batch_of(micro)).passed is None


def test_dropout_comes_back_also_after_an_error() -> None:
    network = module(dropout=0.4).network
    off = without_dropout(network)
    off.__enter__()
    assert {m.p for m in network.modules() if isinstance(m, nn.Dropout)} == {0.0}
    assert not off.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert {m.p for m in network.modules() if isinstance(m, nn.Dropout)} == {0.4}


def adapted(*, dora: bool = False) -> nn.Module:
    model = llama()
    model.set_attn_implementation(attention.PACKED)
    return attach(model, AdapterSpec(trains="adapter", rank=4, alpha=8.0, use_dora=dora))


@pytest.mark.parametrize("dora", [False, True])
def test_a_fresh_adapter_adds_nothing_and_a_trained_one_something(dora: bool) -> None:
    network, micro = adapted(dora=dora), probe(VOCABULARY)
    assert adapter_item(network, micro, fresh=True).passed is True
    assert adapter_item(network, micro, fresh=False).passed is False, "it was to go on from something"
    randomize(network)
    assert adapter_item(network, micro, fresh=False).passed is True
    assert adapter_item(network, micro, fresh=True).passed is False
    assert all(module.training for module in network.modules())
    assert all("forward" not in vars(module) for module in network.modules()), "layers are adapted again"


def test_an_adapter_that_cannot_be_switched_off_is_found() -> None:
    network, micro = adapted(), probe(VOCABULARY)
    randomize(network)
    layer: Any = next(m for m in network.modules() if hasattr(m, "lora_A"))
    layer.__class__ = type("Deaf", (type(layer),), {"disable_adapters": property(lambda self: False)})
    item = adapter_item(network, micro, fresh=False)
    assert item.passed is False
    assert "switched off it still changes the base" in item.says


def test_where_everything_trains_there_is_no_adapter() -> None:
    assert adapter_item(llama().requires_grad_(True), probe(VOCABULARY), fresh=True).passed is None
