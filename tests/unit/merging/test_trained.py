"""The update of one matrix, against PEFT's own merge, and states that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fine_tune.errors import CheckpointError
from fine_tune.merging.trained import Trained, read_trained, updated
from fine_tune.models.adapter import AdapterSpec, trained_state

GENERATOR = torch.Generator().manual_seed(0)


def adapted(**changes: Any) -> Any:
    torch.manual_seed(0)
    network = get_peft_model(
        nn.Sequential(nn.Linear(24, 16)), LoraConfig(r=4, lora_alpha=6, target_modules=["0"], **changes)
    )
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn(p.shape, generator=GENERATOR))
    return network


def state_of(**changes: Tensor) -> dict[str, Tensor]:
    pair = {"lora_A.weight": torch.zeros(4, 8), "lora_B.weight": torch.zeros(8, 4)}
    return {f"base_model.model.m.{name}": tensor for name, tensor in {**pair, **changes}.items()}


@pytest.mark.parametrize(
    "changes", [{}, {"use_rslora": True}, {"use_dora": True}, {"use_dora": True, "use_rslora": True}]
)
def test_a_merged_matrix_is_the_one_of_peft(changes: dict[str, bool]) -> None:
    network = adapted(**changes)
    spec = AdapterSpec("adapter", 4, 6.0, use_dora="use_dora" in changes, rank_stabilized="use_rslora" in changes)
    found = read_trained(trained_state(network), spec, origin="x")
    weight = network.base_model.model[0].base_layer.weight.detach().clone()
    mine = updated(weight, found.updates["0"], found.scaling)
    theirs = network.merge_and_unload()[0].weight.detach()
    assert (mine - weight).abs().max() > 0.5
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("state", "dora", "message"),
    [
        (
            state_of(lora_embedding_A=torch.zeros(4, 8)),
            False,
            "m.lora_embedding_A is no part of an adapter that can be merged",
        ),
        ({"m.lora_A.weight": torch.zeros(4, 8)}, False, "m.lora_A.weight is no part of an adapter"),
        (dict(list(state_of().items())[:1]), False, "the adapter of m is not complete"),
        (state_of(), True, "the adapter of m is not complete"),
        (state_of(lora_magnitude_vector=torch.ones(8)), False, "the adapter of m is not complete"),
    ],
)
def test_what_cannot_be_merged_whole_is_refused(state: dict[str, Tensor], dora: bool, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_trained(state, AdapterSpec("adapter", 4, 8.0, use_dora=dora), origin="x")


def test_a_state_of_all_weights_replaces_them() -> None:
    whole = {"model.norm.weight": torch.ones(3)}
    assert read_trained(whole, AdapterSpec("all"), origin="x") == Trained(whole=whole)
