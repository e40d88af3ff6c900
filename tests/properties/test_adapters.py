"""N13 and N14: what an adapter adds, and what a 4-bit base stands for."""

from __future__ import annotations

import hashlib
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from fine_tune.losses.sft import sft_loss
from fine_tune.models.adapter import AdapterSpec, attach, causal_lm, load_trained_state, trainable, trained_state
from fine_tune.models.base import load_base
from fine_tune.models.dense_base import make_dense
from fine_tune.models.forward import supervised_logps
from fine_tune.models.merged_meanwhile import merged_meanwhile
from fine_tune.packing.batches import MicroBatch, pack

from ..unit.models.conftest import base_folder as base_folder
from ..unit.models.conftest import base_spec, llama, randomize, train_steps
from .drawn import LENGTHS, TOLERANCE, plain, rows_of
from .judging import Step, distance, exceeds, same, step

SPEC = AdapterSpec(trains="adapter", rank=4, alpha=8.0)
MICRO = pack(rows_of([5, 9, 3, 7]))
FLOAT32, GRADIENTS = 1e-5, 5e-6  # products in another order
LAYERS = 2 * 7


def taught(network: nn.Module, micro: MicroBatch = MICRO) -> Step:
    return step(network, lambda: sft_loss(supervised_logps(network, micro), num_step_tokens=len(micro.rows)))


def felt(network: nn.Module, micro: MicroBatch) -> Step:
    """The loss and its gradient in the embedded tokens, which every layer of the base sends down."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    hook = causal_lm(network).get_input_embeddings().register_forward_hook(keep)
    try:
        loss = sft_loss(supervised_logps(network, micro), num_step_tokens=len(micro.rows))
    finally:
        hook.remove()
    return Step(loss.detach(), torch.autograd.grad(loss, seen)[0])


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return llama()


@pytest.fixture(scope="module")
def fresh() -> nn.Module:
    return attach(llama(), SPEC)


@plain(6)
@given(lengths=LENGTHS)
def test_n13_an_adapter_at_its_start_is_the_base_in_every_bit(
    base: nn.Module, fresh: nn.Module, lengths: list[int]
) -> None:
    same(felt(fresh, pack(rows_of(lengths))), felt(base, pack(rows_of(lengths))), 0.0)


def test_n13_control_an_adapter_that_starts_elsewhere(base: nn.Module, network: nn.Module) -> None:
    exceeds(felt(network.float(), MICRO), felt(base, MICRO), FLOAT32)
    network.double()


def merged(network: nn.Module, scale: float) -> tuple[Any, dict[str, nn.Linear]]:
    """A plain model with ``W + scale * B A`` written into its layers, and these layers by name."""
    model, layers = llama().double(), {}
    for name, layer in causal_lm(network).named_modules():
        if hasattr(layer, "lora_A"):
            plain_layer: Any = model.get_submodule(name)
            a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
            plain_layer.weight.data += scale * b @ a
            layers[name] = plain_layer
    assert len(layers) == LAYERS
    return model, layers


def through_merged(network: nn.Module, micro: MicroBatch, scale: float = 8.0 / 4) -> Step:
    """Loss of the merged model, and the adapter's gradients by the chain rule: ``s B' dW`` and ``s dW A'``."""
    model, layers = merged(network, scale)
    for layer in layers.values():
        layer.weight.requires_grad_()
    loss = sft_loss(supervised_logps(model, micro), num_step_tokens=len(micro.rows))
    slopes = dict(zip(layers, torch.autograd.grad(loss, [layer.weight for layer in layers.values()]), strict=True))
    found = []
    for full_name in trainable(network):
        name, _, matrix = full_name.removeprefix("base_model.model.").rpartition(".lora_")
        adapter: Any = causal_lm(network).get_submodule(name)
        a, b = adapter.lora_A["default"].weight.detach(), adapter.lora_B["default"].weight.detach()
        found.append(scale * (b.T @ slopes[name] if matrix.startswith("A") else slopes[name] @ a.T))
    return Step(loss.detach(), torch.cat([slope.flatten() for slope in found]))


@plain(4)
@given(lengths=LENGTHS)
def test_n13_merged_is_unmerged_in_loss_and_gradients(exact_norm: None, network: nn.Module, lengths: list[int]) -> None:
    micro = pack(rows_of(lengths))
    same(taught(network, micro), through_merged(network, micro), TOLERANCE)


def test_n13_control_a_merge_at_another_scale(exact_norm: None, network: nn.Module) -> None:
    exceeds(through_merged(network, MICRO, scale=2.02), taught(network), TOLERANCE)


def test_n13_merged_meanwhile_is_unmerged_in_float32(fresh: nn.Module) -> None:
    network = attach(llama(), SPEC)
    randomize(network)
    with torch.no_grad():
        before = supervised_logps(network, MICRO)
        with merged_meanwhile(network) as count:
            assert count == LAYERS
            assert distance(supervised_logps(network, MICRO), before) <= FLOAT32
        with merged_meanwhile(fresh):
            exceeds(supervised_logps(fresh, MICRO), before, FLOAT32)


def test_n13_saved_and_loaded_is_the_same_to_the_bit() -> None:
    network, other = attach(llama(), SPEC), attach(llama(), SPEC)
    randomize(network)
    right = taught(network)
    exceeds(taught(other), right, FLOAT32)  # the control: not yet loaded
    load_trained_state(other, trained_state(network), origin="here")
    same(taught(other), right, 0.0)


def frozen_hash(network: nn.Module) -> str:
    """Everything that is not an adapter's, whether it may train or not."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        if "lora_" not in name:
            digest.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("bits", [16, 4])
def test_n13_n14_training_moves_the_adapter_and_no_bit_of_the_base(base_folder: Path, bits: int) -> None:
    network = attach(load_base(base_spec(base_folder, bits=bits)), SPEC)
    before, start = frozen_hash(network), trained_state(network)
    train_steps(network, 2)
    assert frozen_hash(network) == before
    assert {name for name, p in network.named_parameters() if p.grad is not None} == set(trainable(network))
    assert all("lora_" in name for name in trainable(network))
    assert all(not torch.equal(tensor, start[name]) for name, tensor in trained_state(network).items())


def test_n13_control_a_base_that_trains_has_another_hash() -> None:
    network = attach(llama(), AdapterSpec(trains="all"))
    before, start = frozen_hash(network), torch.cat([p.detach().flatten() for p in network.parameters()])
    train_steps(network, 1, lr=1e-6)
    assert frozen_hash(network) != before
    exceeds(torch.cat([p.detach().flatten() for p in network.parameters()]), start, 0.0)


def nf4_grid() -> Tensor:
    """The 16 values of NormalFloat: quantiles of the normal distribution on each side of zero, the largest made 1.

    Source: Dettmers et al. 2023 (arXiv:2305.14314), section 3.
    """
    quantile, most = NormalDist().inv_cdf, 0.9677083
    above = [quantile(most + (0.5 - most) * k / 8) for k in range(8)]
    below = [-quantile(most + (0.5 - most) * k / 7) for k in range(7)]
    grid = torch.tensor(sorted([*above, 0.0, *below]), dtype=torch.float64)
    return grid / grid.abs().max()


def quantised(weight: Tensor, grid: Tensor, block: int = 64) -> tuple[Tensor, Tensor]:
    """The nearest value of the grid times its block's largest weight; and that largest weight, one per weight."""
    blocks = weight.double().reshape(-1, block)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / largest)[..., None].sub(grid).abs().argmin(-1)
    return (grid[nearest] * largest).reshape(weight.shape), largest.expand_as(blocks).reshape(weight.shape)


def weights_of(network: Any) -> dict[str, Tensor]:
    return {n: m.weight.detach() for n, m in network.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


@pytest.fixture(scope="module")
def dense(base_folder: Path) -> dict[bool, dict[str, Tensor]]:
    """What 4-bit bases stand for, without and with quantised scales."""
    found = {}
    for double_quant in (False, True):
        model = load_base(base_spec(base_folder, bits=4, double_quant=double_quant))
        assert make_dense(model, torch.float32) == LAYERS
        found[double_quant] = weights_of(model)
    return found


def test_n14_four_bits_are_the_nearest_normal_floats(dense: dict[bool, dict[str, Tensor]]) -> None:
    grid = nf4_grid()
    half_gap = grid.diff().max().item() / 2
    for name, weight in weights_of(llama()).items():
        expected, largest = quantised(weight, grid)
        assert distance(dense[False][name], expected) <= 1e-6
        errors = (dense[False][name].double() - weight.double()).abs() / largest
        assert errors.max().item() <= half_gap * (1 + 1e-6)
        # Scales in 8 bits: their distance from the mean lies on a grid whose steps are 1/64 of nine tenths at most.
        spread = (largest - largest.mean()).abs().max().item()
        moved = (dense[True][name].double() - dense[False][name].double()).abs().max().item()
        assert 0 < moved <= 0.9 / 64 / 2 * spread * (1 + 1e-6)


def test_n14_control_another_grid_and_another_block(dense: dict[bool, dict[str, Tensor]]) -> None:
    weight = weights_of(llama())["model.layers.0.mlp.up_proj"]
    mine = dense[False]["model.layers.0.mlp.up_proj"]
    exceeds(quantised(weight, torch.linspace(-1, 1, 16, dtype=torch.float64))[0], mine.double(), 1e-6)
    exceeds(quantised(weight, nf4_grid(), block=128)[0], mine.double(), 1e-6)


def standing_in(weights: dict[str, Tensor]) -> nn.Module:
    model = llama()
    for name, weight in weights.items():
        layer: Any = model.get_submodule(name)
        layer.weight.data = weight.to(torch.float32)
    network = attach(model, SPEC)
    randomize(network)
    return network


def test_n14_gradients_go_through_the_nearest_normal_floats(base_folder: Path) -> None:
    network = attach(load_base(base_spec(base_folder, bits=4, double_quant=False)), SPEC)
    randomize(network)
    plain_weights = weights_of(llama())
    judged = taught(standing_in({name: quantised(w, nf4_grid())[0] for name, w in plain_weights.items()}))
    same(taught(network), judged, GRADIENTS)
    # The control: the weights that were quantised.
    exceeds(taught(standing_in(plain_weights)), judged, GRADIENTS)
