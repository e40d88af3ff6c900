"""Our operation in PEFT's layers: the same results, names and files, and PEFT's own path for all it does not cover."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fine_tune.models import fused_lora
from fine_tune.models.adapter import AdapterSpec, attach, save_adapter_folder, trainable
from fine_tune.models.base import load_base
from fine_tune.models.forward import supervised_logps
from fine_tune.models.fused_lora import FusedLinear, fuse

from .conftest import base_spec, llama, micro_batch, randomize
from .tiny_lora import Tiny, X, adapted, distance, results


class Calls:
    """Counts layers that take our operation; by default both of them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.count += 1
        return self.original(*args, **kwargs)

    original = staticmethod(fused_lora.lora_linear)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    counter = Calls()
    monkeypatch.setattr(fused_lora, "lora_linear", counter)
    return counter


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["alpha/r", "alpha/sqrt(r)"])
@pytest.mark.parametrize(("quantised", "tolerance"), [(False, 1e-14), (True, 2e-6)], ids=["dense", "4 bits"])
def test_layers_are_pefts(calls: Calls, options: dict[str, Any], quantised: bool, tolerance: float) -> None:
    model = adapted(quantised=quantised, **options)
    expected = results(model)
    assert len(expected) == 6
    assert fuse(model) == 2
    assert calls.count == 0
    found = results(model)
    assert calls.count == 2
    assert distance(found, expected) < tolerance
    layer: Any = model.base_model.model.up
    layer.scaling["default"] *= 1.01
    assert distance(results(model), expected) > 1e-3, "the control: the scale is read when a layer runs"


def test_the_scale_is_that_of_the_method() -> None:
    plain, stabilised = adapted(), adapted(use_rslora=True)
    assert (plain.base_model.model.up.scaling["default"], stabilised.base_model.model.up.scaling["default"]) == (3, 6)


def with_two(model: PeftModel, *active: str) -> PeftModel:
    model.add_adapter("second", LoraConfig(r=4, lora_alpha=4, target_modules=["up", "down"]))
    model.to(torch.float64)
    randomize(model, seed=3)
    model.base_model.set_adapter(list(active))
    return model


def merged(model: PeftModel) -> PeftModel:
    model.base_model.merge_adapter()  # type: ignore[operator]
    return model


def trains_base(model: PeftModel) -> PeftModel:
    for layer in (model.base_model.model.up, model.base_model.model.down):
        layer.base_layer.weight.requires_grad_(True)  # type: ignore[union-attr]
    return model


def switched_off(model: PeftModel) -> PeftModel:
    model.base_model.disable_adapter_layers()  # type: ignore[operator]
    return model


BEYOND: dict[str, Callable[[], PeftModel]] = {
    "DoRA": lambda: adapted(use_dora=True),
    "bias of B": lambda: adapted(lora_bias=True, target_modules=["up"]),
    "off": lambda: switched_off(adapted()),
    "merged": lambda: merged(adapted()),
    "two at once": lambda: with_two(adapted(), "default", "second"),
    "none": lambda: with_two(adapted(), *()),
    "base trains": lambda: trains_base(adapted()),
}


@pytest.mark.parametrize("kind", BEYOND)
def test_what_it_does_not_cover_is_left_to_peft(calls: Calls, kind: str) -> None:
    expected = results(BEYOND[kind]())
    model = BEYOND[kind]()
    assert fuse(model) == (1 if kind == "bias of B" else 2)
    found = results(model)
    assert calls.count == 0
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)), "the very same operations"


@pytest.mark.parametrize("kind", ["off", "merged"])
def test_a_layer_decides_anew_in_each_call(calls: Calls, kind: str) -> None:
    model = adapted()
    expected = results(model)
    fuse(model)
    (switched_off if kind == "off" else merged)(model)
    results(model)
    assert calls.count == 0
    if kind == "off":
        model.base_model.enable_adapter_layers()  # type: ignore[operator]
    else:
        model.base_model.unmerge_adapter()  # type: ignore[operator]
    assert distance(results(model), expected) < 1e-13
    assert calls.count == 2


def test_a_4_bit_base_that_was_merged_and_unmerged_is_the_one_that_it_has_now(calls: Calls) -> None:
    """Merging rounds to the grid: what comes back is another base, and both ways must stand on it."""
    model = adapted(quantised=True)
    before = results(model)
    fuse(model)
    with pytest.warns(UserWarning, match="rounding"):
        merged(model)
    with pytest.warns(UserWarning, match="rounding"):
        model.base_model.unmerge_adapter()  # type: ignore[operator]
    found = results(model)
    for layer, kind in ((model.base_model.model.up, Linear4bit), (model.base_model.model.down, Linear4bit)):
        layer.__class__ = kind  # type: ignore[assignment]
    expected = results(model)
    assert distance(expected, before) > 1e-3, "another base"
    assert distance(found, expected) < 2e-6


@pytest.mark.parametrize(("quantised", "tolerance"), [(False, 1e-14), (True, 2e-6)], ids=["dense", "4 bits"])
def test_dropout_draws_what_pefts_draws(calls: Calls, quantised: bool, tolerance: float) -> None:
    model = adapted(quantised=quantised, lora_dropout=0.4)
    expected = results(model)
    assert distance(results(adapted(quantised=quantised)), expected) > 0.05, "it drops something"
    fuse(model)
    assert fused_lora.trains_fused(model)
    found = results(model)
    assert calls.count == 2
    assert distance(found, expected) < tolerance


def test_dropout_does_nothing_in_an_answer(calls: Calls) -> None:
    model = adapted(lora_dropout=0.4).eval()
    expected = results(model)
    fuse(model)
    assert distance(results(model), expected) < 1e-14
    assert calls.count == 2


def test_the_active_one_of_two_adapters_is_taken(calls: Calls) -> None:
    model = with_two(adapted(), "second")
    expected = results(model)
    model.base_model.set_adapter(["default"])
    assert distance(results(model)[:1], expected[:1]) > 0.1, "they differ"
    fuse(model)
    model.base_model.set_adapter(["second"])
    assert distance(results(model), expected) < 1e-14
    assert calls.count == 2


def test_adapters_named_row_by_row_are_left_to_peft(calls: Calls) -> None:
    model = with_two(adapted(), "default").eval()
    options = {"adapter_names": ["default", "second", "__base__"]}
    expected = results(model, **options)
    fuse(model)
    assert distance(results(model, **options), expected) == 0
    assert calls.count == 0


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "4 bits"])
def test_under_autocast_it_answers_in_pefts_dtype(calls: Calls, quantised: bool) -> None:
    model = adapted(quantised=quantised).float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = results(model)
        fuse(model)
        found = results(model)
    assert calls.count == 2
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    # Eight bits of mantissa; PEFT rounds the two products apart.
    assert 0 < distance([t.float() for t in found], [t.float() for t in expected]) < 0.03


@pytest.mark.parametrize(("bits", "tolerance"), [(16, 1e-9), (4, 1e-5)])
def test_a_whole_network_scores_and_learns_alike(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch, bits: int, tolerance: float
) -> None:
    def exact(self: LlamaRMSNorm, states: Tensor) -> Tensor:
        return self.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    # transformers' norm goes through float32, whose rounding is no concern of this test.
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact)
    base = llama() if bits == 16 else load_base(base_spec(base_folder, bits=bits))
    network = attach(base, AdapterSpec(trains="adapter", rank=4, alpha=8.0))
    if bits == 16:
        network.double()
    randomize(network)

    def passed() -> list[Tensor]:
        network.zero_grad()
        scores = supervised_logps(network, micro_batch())
        scores.sum().backward()
        return [scores.detach(), *(p.grad.clone() for p in trainable(network).values() if p.grad is not None)]

    expected = passed()
    assert len(expected) == 1 + 28
    assert fuse(network) == 14
    assert 0 < distance(passed(), expected) < tolerance


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_names_parameters_and_files_stay(tmp_path: Path) -> None:
    network = attach(llama(), AdapterSpec(trains="adapter", rank=4, alpha=8.0, target_modules=["q_proj", "down_proj"]))
    randomize(network)
    parameters, keys = dict(network.named_parameters()), list(network.state_dict())
    modules = [name for name, _ in network.named_modules()]
    save_adapter_folder(network, tmp_path / "peft", {"a": 1})
    assert fuse(network) == 4
    after = dict(network.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert list(network.state_dict()) == keys
    assert [name for name, _ in network.named_modules()] == modules
    save_adapter_folder(network, tmp_path / "fused", {"a": 1})
    assert hashes(tmp_path / "fused") == hashes(tmp_path / "peft")
    assert len(hashes(tmp_path / "fused")) >= 2


def test_the_adapter_comes_off_and_the_base_is_what_it_was() -> None:
    network, bare = adapted(), Tiny()
    fuse(network)
    assert {type(network.base_model.model.up), type(network.base_model.model.down)} == {FusedLinear}
    inner: Any = network.unload()
    assert {type(inner.up), type(inner.down)} == {nn.Linear}
    assert torch.equal(inner(X), bare(X))
    joined: Any = adapted()
    expected = joined(X)
    fuse(joined)
    torch.testing.assert_close(joined.merge_and_unload()(X), expected, rtol=0, atol=1e-12)


def test_what_has_no_adapter_or_is_no_linear_layer_is_left_alone() -> None:
    bare = Tiny()
    assert fuse(bare) == 0
    assert type(bare.up) is nn.Linear
    model = adapted(target_modules=["up"])
    assert fuse(model) == 1
    assert fuse(model) == 0, "once is enough"
    odd = adapted()
    odd.base_model.model.up.fan_in_fan_out = True  # type: ignore[assignment,union-attr]
    assert fuse(odd) == 1
    assert type(odd.base_model.model.up) is Linear


def test_few_rows_without_a_backward_pass_are_left_to_bitsandbytes(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(quantised=True)
    fuse(model)
    x = X.float()
    with torch.no_grad():
        theirs = model(x)
        assert calls.count == 0
        monkeypatch.setattr(fused_lora, "FEW_ROWS", x.numel() // x.shape[-1])
        ours = model(x)
    assert calls.count == 2
    assert distance([ours], [theirs]) < 2e-6
    # A backward pass follows: ours, however few rows.
    monkeypatch.setattr(fused_lora, "FEW_ROWS", 10**6)
    results(model)
    assert calls.count == 4
    dense = adapted()
    fuse(dense)
    with torch.no_grad():
        dense(X)
    assert calls.count == 6
