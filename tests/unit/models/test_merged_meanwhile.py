"""Merged for a while: the same function, by one product a layer, and nothing left of it afterwards."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fine_tune.models.adapter import adapter_off
from fine_tune.models.merged_meanwhile import merged_meanwhile

LAYERS = 2 * 7


def adapted(*, quantised: bool = False, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, attention_bias=True
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    if quantised:
        quantise(model)
    settings = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    network = get_peft_model(model, LoraConfig(**settings))
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return network.eval()


def quantise(model: nn.Module) -> None:
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                shape = (child.in_features, child.out_features, child.bias is not None)
                made = bnb.nn.Linear4bit(*shape, compute_dtype=torch.float32, quant_type="nf4")
                made.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
                made.bias = child.bias
                made.support_avx512bf16_for_cpu = False
                setattr(parent, name, made.to("cpu"))
    model.is_loaded_in_4bit = True


IDS = torch.arange(24).reshape(2, 12)


@torch.no_grad()
def logits(network: nn.Module) -> torch.Tensor:
    return network(input_ids=IDS).logits


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_it_is_the_same_function(quantised: bool, rank_stabilized: bool) -> None:
    network = adapted(quantised=quantised, use_rslora=rank_stabilized)
    before = logits(network)
    with adapter_off(network):
        base = logits(network)
    assert (before - base).abs().max() > 0.1, "the adapter does something"
    with merged_meanwhile(network) as count:
        assert count == LAYERS
        torch.testing.assert_close(logits(network), before, atol=2e-5, rtol=1e-4)
    with adapter_off(network), merged_meanwhile(network) as count:
        assert count == LAYERS
        torch.testing.assert_close(logits(network), base, atol=2e-5, rtol=1e-4)
    assert torch.equal(logits(network), before), "nothing is left of it"
    assert not any("forward" in module.__dict__ for module in network.modules())


def test_the_scale_counts() -> None:
    """The control: a merge with another scale is seen by the comparison above."""
    network = adapted()
    before = logits(network)
    layer = next(module for module in network.modules() if isinstance(module, LoraLayer))
    layer.scaling["default"] *= 1.1
    with merged_meanwhile(network):
        assert (logits(network) - before).abs().max() > 1e-3


def test_it_takes_no_part_in_what_it_cannot_say_in_one_product() -> None:
    for network in (adapted(use_dora=True), adapted(lora_bias=True, target_modules=["q_proj", "v_proj"])):
        before = logits(network)
        with merged_meanwhile(network) as count:
            assert count == 0
            assert torch.equal(logits(network), before)
    double = adapted()
    double.double()
    with merged_meanwhile(double) as count:
        assert count == 0


def test_several_adapters_are_left_alone() -> None:
    network = adapted()
    network.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    network.base_model.set_adapter(["default", "other"])
    with merged_meanwhile(network) as count:
        assert count == 0


def test_weights_that_are_too_large_stay_as_they_are() -> None:
    with merged_meanwhile(adapted(), most_bytes=1000) as count:
        assert count == 0


def test_an_error_inside_takes_it_back_too() -> None:
    network = adapted()
    with pytest.raises(ZeroDivisionError), merged_meanwhile(network):
        _ = 1 / 0
    assert not any("forward" in module.__dict__ for module in network.modules())
