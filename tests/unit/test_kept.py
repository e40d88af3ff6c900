"""A base that several runs use is loaded once, and none of them sees what another did to it."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fine_tune.kept import Kept, same_tensors


def tiny() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=True
    )
    return LlamaForCausalLM(config).requires_grad_(False)


def quantised() -> nn.Module:
    layer = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(torch.randn(32, 64), requires_grad=False, quant_type="nf4")
    return nn.Sequential(layer).to("cpu")


def test_a_copy_has_the_same_tensors_and_its_own_modules() -> None:
    base = tiny()
    copy = same_tensors(base)
    mine, theirs = dict(base.named_parameters()), dict(copy.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(theirs[name] is mine[name] for name in mine)
    assert copy.get_output_embeddings().weight is copy.get_input_embeddings().weight
    assert not {id(module) for module in base.modules()} & {id(module) for module in copy.modules()}
    copy.model.layers[0].self_attn.q_proj = nn.Identity()
    copy.config.hidden_size = 1
    assert isinstance(base.model.layers[0].self_attn.q_proj, nn.Linear)
    assert base.config.hidden_size == 64


def test_a_quantised_copy_shares_its_scales_and_answers_the_same() -> None:
    torch.manual_seed(0)
    base = quantised()
    copy = same_tensors(base)
    assert copy[0].weight is base[0].weight
    assert copy[0].weight.quant_state is base[0].weight.quant_state
    x = torch.randn(3, 64)
    assert torch.equal(copy(x), base(x))


def test_the_same_key_loads_once_and_another_key_frees_the_first() -> None:
    kept, made = Kept(), []

    def load() -> nn.Module:
        made.append(tiny())
        return made[-1]

    first, second = kept.base("a", load), kept.base("a", load)
    assert len(made) == kept.num_loads == 1
    assert first is not second
    assert first is not made[0]
    assert kept.key == "a"
    kept.base("b", load)
    assert len(made) == kept.num_loads == 2
    assert kept.key == "b"
    kept.forget()
    assert kept.key is None
    kept.base("b", load)
    assert len(made) == 3


def test_a_deep_copy_would_take_the_memory_twice() -> None:
    """The control of the test above: what ``same_tensors`` is there to avoid."""
    import copy

    base = tiny()
    other = copy.deepcopy(base)
    assert next(other.parameters()) is not next(base.parameters())


@pytest.mark.parametrize("bits", [8])
def test_bases_that_cannot_be_shared(bits: int) -> None:
    from fine_tune.assembly import is_shared

    assert is_shared({"method": {"trains": "adapter", "bits": 4}})
    assert not is_shared({"method": {"trains": "adapter", "bits": bits}})
    assert not is_shared({"method": {"trains": "all", "bits": 16}})
