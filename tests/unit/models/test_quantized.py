"""4-bit and 8-bit bases on the CPU: frozen bit for bit, with right gradients, whatever ran before."""

from __future__ import annotations

import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from fine_tune.errors import EnvironmentProblem
from fine_tune.losses.sft import sft_loss
from fine_tune.models import base
from fine_tune.models.adapter import AdapterSpec, attach, causal_lm, trainable
from fine_tune.models.base import load_base
from fine_tune.models.forward import supervised_logps

from .conftest import base_spec, micro_batch, train_steps

SPEC = AdapterSpec(trains="adapter", rank=4, alpha=8.0)


def frozen_bytes(network: nn.Module) -> dict[str, bytes]:
    """Everything that must not change, the constants of quantisation included."""
    found = {}
    for name, module in network.named_modules():
        for kind, tensor in module.named_parameters(recurse=False):
            if not tensor.requires_grad:
                found[f"{name}.{kind}"] = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            found[f"{name}.absmax"] = state.absmax.numpy().tobytes()
    return found


def test_loading_has_rows_read_in_whole_blocks(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for in 4 bits, or stored in 4 bits already."""
    done: list[str] = []
    monkeypatch.setattr(base, "read_in_whole_blocks", lambda: done.append("done"))
    load_base(base_spec(base_folder))
    assert done == []
    load_base(base_spec(base_folder, bits=4)).save_pretrained(str(tmp_path))
    assert done == ["done"]
    stored = load_base(base_spec(tmp_path))
    assert sum(isinstance(module, bnb.nn.Linear4bit) for module in stored.modules()) == 14
    assert done == ["done", "done"]


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_4_bit_base_stays_bit_for_bit_while_every_adapter_matrix_moves(base_folder: Path, double_quant: bool) -> None:
    network = attach(load_base(base_spec(base_folder, bits=4, double_quant=double_quant)), SPEC)
    quantized = [m for m in network.modules() if isinstance(m, bnb.nn.Linear4bit) and not hasattr(m, "base_layer")]
    assert len(quantized) == 14
    assert {m.weight.dtype for m in quantized} == {torch.uint8}
    assert all(m.weight.quant_state.nested is double_quant for m in quantized)
    before, start = frozen_bytes(network), {n: p.detach().clone() for n, p in trainable(network).items()}
    losses = train_steps(network, 3)
    assert frozen_bytes(network) == before
    still = [name for name, p in trainable(network).items() if torch.equal(p, start[name])]
    assert still == []
    assert losses[-1] < losses[0]


def test_the_repacking_forward_of_some_cpus_is_off(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    assert bnb.nn.Linear4bit(2, 2).support_avx512bf16_for_cpu, "this test needs a CPU that would repack"
    model = load_base(base_spec(base_folder, bits=4))
    flags = [m.support_avx512bf16_for_cpu for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert flags == [False] * 14


def test_an_evaluation_before_training_does_not_change_gradients(base_folder: Path) -> None:
    def gradients(look_first: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        network = attach(load_base(base_spec(base_folder, bits=4)), SPEC)
        for parameter in trainable(network).values():
            parameter.data = torch.full_like(parameter, 0.05)
        micro = micro_batch()
        if look_first:
            network.eval()
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                supervised_logps(network, micro)
            network.train()
        sft_loss(supervised_logps(network, micro), num_step_tokens=len(micro.rows)).backward()
        return {name: p.grad for name, p in trainable(network).items() if p.grad is not None}

    plain, after = gradients(False), gradients(True)
    assert len(plain) == 28
    assert all(torch.equal(plain[name], after[name]) for name in plain)


def test_4_bit_gradients_are_those_of_the_weights_it_stands_for(base_folder: Path) -> None:
    network = attach(load_base(base_spec(base_folder, bits=4)), SPEC)
    plain = attach(load_base(base_spec(base_folder)), SPEC)
    with torch.no_grad():
        for (_, mine), (_, theirs) in zip(
            causal_lm(network).named_modules(), causal_lm(plain).named_modules(), strict=True
        ):
            if isinstance(mine, bnb.nn.Linear4bit):
                theirs.weight.copy_(bnb.functional.dequantize_4bit(mine.weight.data, mine.weight.quant_state))
    generator = torch.Generator().manual_seed(5)
    for one, other in zip(trainable(network).values(), trainable(plain).values(), strict=True):
        one.data = torch.randn(one.shape, generator=generator) * 0.1
        other.data = one.data.clone()
    micro = micro_batch()
    for each in (network, plain):
        sft_loss(supervised_logps(each, micro), num_step_tokens=len(micro.rows)).backward()
    for name, mine in trainable(network).items():
        theirs = trainable(plain)[name].grad
        assert mine.grad is not None
        assert theirs is not None
        # float32 products in another order.
        torch.testing.assert_close(mine.grad, theirs, rtol=1e-4, atol=1e-6)


def test_an_8_bit_base_trains_on_the_cpu(base_folder: Path) -> None:
    network = attach(load_base(base_spec(base_folder, bits=8)), SPEC)
    assert sum(isinstance(m, bnb.nn.Linear8bitLt) and not hasattr(m, "base_layer") for m in network.modules()) == 14
    before, start = frozen_bytes(network), {n: p.detach().clone() for n, p in trainable(network).items()}
    losses = train_steps(network, 3)
    assert losses[-1] < losses[0]
    assert not [name for name, p in trainable(network).items() if torch.equal(p, start[name])]
    after = frozen_bytes(network)
    assert after == before


def test_a_missing_bitsandbytes_says_what_to_install(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        EnvironmentProblem, match=r"bitsandbytes is not installed.*pip install bitsandbytes.*method=lora"
    ):
        load_base(base_spec(base_folder, bits=4))
