"""A frozen adapter on the policy's own layers: a copy that nothing moves, and a policy that comes back untouched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fine_tune.models.adapter import AdapterSpec, attach, trainable
from fine_tune.models.forward import supervised_logps
from fine_tune.modules.reference import FrozenAdapter, fingerprint, snapshot

from ..models.conftest import llama, micro_batch, randomize

KINDS = {
    "lora": (False, AdapterSpec(trains="adapter", rank=4)),
    "dora": (False, AdapterSpec(trains="adapter", rank=4, use_dora=True)),
    "new tokens": (False, AdapterSpec(trains="adapter", rank=4, new_tokens=[3, 5])),
    "new tokens, tied": (True, AdapterSpec(trains="adapter", rank=4, new_tokens=[3, 5])),
    "every weight": (False, AdapterSpec(trains="all")),
}


def network(kind: str = "lora") -> nn.Module:
    tied, spec = KINDS[kind]
    found = attach(llama(tied=tied), spec)
    if spec.trains == "adapter":
        randomize(found)
    return found


def scores(model: nn.Module) -> Tensor:
    return supervised_logps(model, micro_batch()).detach()


def move(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_scores_as_the_policy_did_whatever_the_policy_became(kind: str) -> None:
    model = network(kind)
    start = scores(model)
    reference = FrozenAdapter(model, snapshot(model))
    move(model)
    moved = scores(model)
    with reference.handed():
        assert torch.equal(scores(model), start)
    assert torch.equal(scores(model), moved)
    assert (moved - start).abs().max() > 1e-2


def test_the_policys_own_parameters_come_back_also_after_an_error() -> None:
    model = network()
    own, names = trainable(model), list(dict(model.named_parameters()))
    reference = FrozenAdapter(model, snapshot(model))
    with reference.handed():
        handed = trainable(model)
        assert handed.keys() == own.keys()
        assert all(handed[name] is not parameter for name, parameter in own.items())
    with pytest.raises(RuntimeError, match="a pass that fails"), reference.handed():
        raise RuntimeError("a pass that fails")
    assert all(trainable(model)[name] is parameter for name, parameter in own.items())
    assert list(dict(model.named_parameters())) == names, "in the order that optimizer and checkpoint know"


def test_two_references_nest() -> None:
    model = network()
    outer = FrozenAdapter(model, snapshot(model))
    move(model)
    inner = FrozenAdapter(model, snapshot(model))
    with outer.handed():
        before = scores(model)
        with inner.handed():
            assert not torch.equal(scores(model), before)
        assert torch.equal(scores(model), before)


def test_values_are_copied_and_never_shared() -> None:
    model = network()
    values = snapshot(model)
    assert all(tensor.data_ptr() != trainable(model)[name].data_ptr() for name, tensor in values.items())
    reference = FrozenAdapter(model, values)
    with reference.handed():
        before = scores(model)
    for tensor in values.values():
        tensor.zero_()
    with reference.handed():
        assert torch.equal(scores(model), before)


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_untrained_adapter_as_reference_is_the_base_whatever_the_policy_becomes(use_dora: bool) -> None:
    """B = 0 is not copied, but it must not move either; A is the policy's own, and has no say."""
    spec = AdapterSpec(trains="adapter", rank=4, alpha=8.0, use_dora=use_dora)
    model = attach(llama(), spec)
    before, reference = scores(model), FrozenAdapter(model, snapshot(model))
    own = {tensor.data_ptr() for name, tensor in trainable(model).items() if "lora_B" in name}
    assert not own & {tensor.data_ptr() for _, _, tensor in reference._slots}
    randomize(model)
    assert (scores(model) - before).abs().max() > 1e-3
    with reference.handed():
        torch.testing.assert_close(scores(model), before, rtol=0, atol=0)
    ups = [tensor for _, _, tensor in reference._slots if not tensor.any()]
    assert len({tensor.data_ptr() for tensor in ups}) == len({tensor.shape for tensor in ups}) < len(ups)


def test_a_reference_takes_the_policys_dtype() -> None:
    model = network().double()
    values = {name: tensor.float() for name, tensor in snapshot(model).items()}
    with FrozenAdapter(model, values).handed():
        assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float64}


@pytest.mark.parametrize("change", ["one is missing", "one is foreign"])
def test_a_value_for_each_parameter_is_needed(change: str) -> None:
    model = network()
    values = snapshot(model)
    count = len(values)
    name = next(iter(values))
    tensor = values.pop(name)
    if change == "one is foreign":
        values[f"{name}.other"] = tensor
    with pytest.raises(ValueError, match=f"a value for each of {count} parameters, got {len(values)}"):
        FrozenAdapter(model, values)


def test_a_fingerprint_depends_on_names_shapes_types_and_every_bit_but_not_on_order() -> None:
    values = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}
    same = {"b": torch.ones(4), "a": torch.arange(6.0).view(2, 3).T.contiguous().T}
    assert fingerprint(values) == fingerprint(same)
    assert len(fingerprint(values)) == 64
    flipped = values["a"].clone()
    flipped.view(torch.uint8)[1, -1] ^= 1
    others = [
        {"a": values["a"], "c": values["b"]},
        {"a": values["b"], "b": values["a"]},
        {"a": values["a"].view(3, 2), "b": values["b"]},
        {"a": values["a"].view(torch.int32), "b": values["b"]},
        {"a": flipped, "b": values["b"]},
        {"a": values["a"]},
    ]
    assert len({fingerprint(values), *map(fingerprint, others)}) == 7


def test_half_precision_has_a_fingerprint() -> None:
    """numpy knows no bfloat16."""
    assert fingerprint({"a": torch.ones(3, dtype=torch.bfloat16)}) != fingerprint({"a": torch.ones(3).half()})
