"""What updates move and what they must not, judged by the bits of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fine_tune.checklist.weights import WeightWatch, checksums, frozen
from fine_tune.losses.sft import sft_loss
from fine_tune.models.adapter import AdapterSpec, attach, trainable
from fine_tune.models.base import load_base
from fine_tune.models.forward import supervised_logps
from fine_tune.models.hub import resolve_model

from ..models.conftest import base_spec, llama, micro_batch, randomize, train_steps


def adapted(*, moved: bool = False) -> nn.Module:
    network = attach(llama(), AdapterSpec(trains="adapter", rank=4, alpha=8.0))
    if moved:
        randomize(network)
    return network


def backward(network: nn.Module) -> None:
    micro = micro_batch()
    sft_loss(supervised_logps(network, micro), num_step_tokens=len(micro.rows)).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.bool, torch.float64])
def test_a_checksum_sees_every_bit(dtype: torch.dtype) -> None:
    values = torch.arange(24).reshape(4, 6) % 2 == 0 if dtype == torch.bool else torch.arange(24).reshape(4, 6).to(dtype)
    before = checksums({"t": values})
    for index in range(values.numel()):
        other = values.clone()
        flat = other.view(-1).view(torch.uint8)
        flat[index * values.element_size()] ^= 1
        assert checksums({"t": other}) != before
    assert checksums({"t": values.t()}) == before, "the order in memory does not matter"


def test_a_healthy_start_passes() -> None:
    network = adapted()
    watch = WeightWatch(network)
    backward(network)
    watch.look_at_gradients()
    train_steps(network, 2)
    assert watch.gradients is not None
    assert watch.gradients.passed is True
    assert watch.gradients.says == "14 of 14 trained tensors have a gradient; 14 A wait for a B that is not zero"
    assert watch.changed().passed is True
    assert watch.unchanged().passed is True


def test_where_b_is_not_zero_a_must_have_a_gradient_too() -> None:
    network = adapted(moved=True)
    watch = WeightWatch(network)
    backward(network)
    watch.look_at_gradients()
    assert watch.gradients is not None
    assert watch.gradients.says == "28 of 28 trained tensors have a gradient"
    assert watch.gradients.passed is True
    next(p for n, p in trainable(network).items() if "lora_A" in n).grad = None
    watch.look_at_gradients()
    assert watch.gradients.passed is False
    backward(network)
    watch.look_at_gradients()
    assert watch.gradients.passed is False, "a later step does not mend it"


def test_an_adapter_that_is_cut_off_fails() -> None:
    network = adapted()
    watch = WeightWatch(network)
    backward(network)
    named = next(n for n in trainable(network) if "lora_B" in n)
    network.get_parameter(named).grad = torch.zeros_like(network.get_parameter(named))
    watch.look_at_gradients()
    assert watch.gradients is not None
    assert watch.gradients.passed is False
    assert named in watch.gradients.says
    assert "Check method.target_modules" in watch.gradients.says


def test_an_expert_without_a_token_is_no_fault_but_nothing_at_all_is() -> None:
    network = adapted()
    watch = WeightWatch(network)
    watch.look_at_gradients()
    assert watch.gradients is not None
    assert watch.gradients.passed is False


def test_weights_that_stay_where_they_were_fail() -> None:
    network = adapted()
    watch = WeightWatch(network)
    train_steps(network, 2, lr=0.0)
    item = watch.changed()
    assert item.passed is False
    assert item.says.startswith("0 of 28 trained tensors changed")


def test_one_trained_tensor_left_out_of_the_optimizer_fails() -> None:
    network = adapted()
    watch = WeightWatch(network)
    named = next(n for n in trainable(network) if "lora_A" in n)
    kept = network.get_parameter(named).detach().clone()
    train_steps(network, 2)
    with torch.no_grad():
        network.get_parameter(named).copy_(kept)
    item = watch.changed()
    assert item.passed is False
    assert named in item.says


def test_a_base_that_moves_by_one_bit_fails() -> None:
    network = adapted()
    watch = WeightWatch(network)
    norm = next(p for n, p in network.named_parameters() if "input_layernorm" in n)
    norm.data[3] = torch.nextafter(norm.data[3], torch.tensor(9.0))
    item = watch.unchanged()
    assert item.passed is False
    assert "1 of" in item.says
    assert "input_layernorm" in item.says


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_and_their_scales_are_watched(bits: int) -> None:
    base = load_base(base_spec(resolve_model("builtin:tiny"), bits=bits))
    network = attach(base, AdapterSpec(trains="adapter", rank=4, alpha=8.0))
    backward(network)  # 8-bit layers settle in their first pass
    watch = WeightWatch(network)
    train_steps(network, 2)
    assert watch.unchanged().passed is True
    scale = next(value for name, value in frozen(network).items() if name.endswith((".absmax", ".SCB")))
    scale.view(-1).view(torch.uint8)[0] ^= 1
    assert watch.unchanged().passed is False


def test_where_everything_trains_there_is_no_base() -> None:
    network = llama().requires_grad_(True)
    watch = WeightWatch(network)
    assert watch.unchanged().passed is None
    train_steps(network, 2)
    assert watch.changed().passed is True
