"""A 4-bit base made dense: the same values, plain layers, and the same answers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fine_tune.models.adapter import AdapterSpec, attach, causal_lm
from fine_tune.models.base import BaseSpec, load_base, set_attention
from fine_tune.models.dense_base import make_dense
from fine_tune.models.execution import Execution, prepare_layers
from fine_tune.models.hub import resolve_model
from fine_tune.speed import chosen_execution

IDS = torch.arange(5, 37).view(1, -1)


def loaded(*, double_quant: bool = True, quant_type: str = "nf4") -> nn.Module:
    spec = BaseSpec(
        resolve_model("builtin:tiny"), 4, torch.float32, torch.float32, torch.device("cpu"), quant_type, double_quant
    )
    return load_base(spec).eval()


def logits(model: nn.Module) -> torch.Tensor:
    set_attention(model, "sdpa")  # type: ignore[arg-type]
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_layer_becomes_plain_with_the_values_it_stands_for(double_quant: bool, quant_type: str) -> None:
    from bitsandbytes.functional import dequantize_4bit

    model = loaded(double_quant=double_quant, quant_type=quant_type)
    weights = {
        n: m.weight for n, m in model.named_modules() if getattr(getattr(m, "weight", None), "quant_state", None)
    }
    wanted = {n: dequantize_4bit(w.data, w.quant_state) for n, w in weights.items()}
    names = {name for name, _ in model.named_modules()}
    assert make_dense(model, torch.float32) == len(wanted) > 10
    found = dict(model.named_modules())
    assert set(found) == names
    for name, weight in wanted.items():
        assert type(found[name]) is nn.Linear
        assert not found[name].weight.requires_grad
        # bitsandbytes may fold the offset of double quantisation in another order.
        torch.testing.assert_close(found[name].weight.data, weight, rtol=1e-6, atol=1e-8)


def test_answers_are_the_same() -> None:
    model = loaded()
    before = logits(model)
    make_dense(model, torch.float32)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_an_adapter_on_it_trains_as_on_the_quantised_one() -> None:
    gradients = []
    for dense in (False, True):
        model = loaded()
        if dense:
            make_dense(model, torch.float32)
        torch.manual_seed(0)
        adapted = attach(model, AdapterSpec("adapter", rank=4, alpha=8))  # type: ignore[arg-type]
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.02)
        runs = prepare_layers(adapted, Execution(fused_lora=True, dense_base=dense))
        assert runs.fused > 10
        set_attention(causal_lm(adapted), "sdpa")
        adapted(input_ids=IDS).logits.logsumexp(-1).sum().backward()
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if p.grad is not None})
    plain, dense_ones = gradients
    assert plain.keys() == dense_ones.keys()
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(
            dense_ones[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()), msg=name
        )


def test_a_dense_model_has_nothing_to_make_dense() -> None:
    spec = BaseSpec(resolve_model("builtin:tiny"), 16, torch.float32, torch.float32, torch.device("cpu"))
    assert make_dense(load_base(spec), torch.float32) == 0


def test_the_key_of_the_config_reaches_it() -> None:
    keys = {"recompute": None, "offload": None, "compile": None, "fused_lora": None, "dense_base": True}
    assert chosen_execution({"speed": "plain", **keys}) == Execution(dense_base=True)
