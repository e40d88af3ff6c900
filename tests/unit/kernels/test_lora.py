"""One operation for a frozen weight and its LoRA adapter: values and gradients of the formula, dense and in 4 bits."""

from __future__ import annotations

from typing import Any, NamedTuple

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn

from fine_tune.kernels.frozen_weight import DENSE, FrozenWeight, dense
from fine_tune.kernels.lora import lora_linear

SCALE = 0.7
RANK = 4
GRIDS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]
each_grid = pytest.mark.parametrize(("grid", "nested"), GRIDS, ids=lambda value: str(value))


class Case(NamedTuple):
    """What goes into one layer, each with its own graph leaf."""

    x: Tensor
    a: Tensor
    b: Tensor
    bias: Tensor | None


def case(outputs: int, inputs: int, *, bias: bool = False, dtype: torch.dtype = torch.float64) -> Case:
    generator = torch.Generator().manual_seed(outputs * 1000 + inputs)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return Case(leaf(2, 5, inputs), leaf(RANK, inputs), leaf(outputs, RANK), leaf(outputs).detach() if bias else None)


def weight(outputs: int, inputs: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(outputs, inputs, generator=generator, dtype=torch.float64).to(dtype)


def plain(parts: Case, dense_weight: Tensor, scale: float = SCALE) -> Tensor:
    """The formula, left to autograd."""
    y = parts.x @ dense_weight.t() + scale * (parts.x @ parts.a.t()) @ parts.b.t()
    return y if parts.bias is None else y + parts.bias


def gradients(y: Tensor, parts: Case) -> tuple[Tensor, ...]:
    """Slopes of a sum in which every output has a weight of its own, for x, A and B."""
    shares = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return torch.autograd.grad((y * shares).sum(), [parts.x, parts.a, parts.b])


def worst(found: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]) -> float:
    """The largest distance of a tensor, relative to its size."""
    left, right = ((one,) if isinstance(one, Tensor) else one for one in (found, expected))
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(left, right, strict=True))


def in_4_bits(outputs: int, inputs: int, grid: str, nested: bool) -> Any:
    holder = bnb.nn.Linear4bit(inputs, outputs, bias=False, quant_type=grid)
    made = bnb.nn.Params4bit(
        weight(outputs, inputs, torch.float32), requires_grad=False, quant_type=grid, compress_statistics=nested, module=holder
    )  # fmt: skip
    return made if made.quant_state is not None else made._quantize("cpu")


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(("outputs", "inputs"), [(24, 16), (16, 24), (16, 16)])
def test_a_dense_layer_is_the_formula(outputs: int, inputs: int, bias: bool) -> None:
    parts, base = case(outputs, inputs, bias=bias), weight(outputs, inputs)
    found = lora_linear(parts.x, FrozenWeight((base,), DENSE), parts.a, parts.b, scale=SCALE, bias=parts.bias)
    expected = plain(parts, base)
    assert found.shape == (2, 5, outputs)
    assert worst(found, expected) < 1e-14
    assert worst(gradients(found, parts), gradients(expected, parts)) < 1e-14


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(("outputs", "inputs"), [(24, 16), (16, 24)])
def test_the_adapter_reads_what_dropout_left(outputs: int, inputs: int, bias: bool) -> None:
    parts, base = case(outputs, inputs, bias=bias), weight(outputs, inputs)
    left = (torch.rand(parts.x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) > 0.3) / 0.7
    found = lora_linear(
        parts.x, FrozenWeight((base,), DENSE), parts.a, parts.b, scale=SCALE, bias=parts.bias, dropped=parts.x * left
    )
    expected = parts.x @ base.t() + SCALE * ((parts.x * left) @ parts.a.t()) @ parts.b.t()
    expected = expected if parts.bias is None else expected + parts.bias
    assert worst(found, expected) < 1e-14
    assert worst(gradients(found, parts), gradients(expected, parts)) < 1e-14
    # Control: without dropout, and with the dropped input for the weight as well, it is another function.
    assert worst(found, plain(parts, base)) > 1e-2
    assert worst(found, plain(parts._replace(x=parts.x * left), base)) > 1e-2


@pytest.mark.parametrize(("outputs", "inputs"), [(7, 5), (5, 7)])
def test_gradients_with_dropout_are_those_of_finite_differences(outputs: int, inputs: int) -> None:
    parts, base = case(outputs, inputs), FrozenWeight((weight(outputs, inputs),), DENSE)

    def layer(x: Tensor, dropped: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, base, a, b, scale=SCALE, dropped=dropped)

    x, dropped = (parts.x[:1, n : n + 2].detach().requires_grad_() for n in (0, 2))
    assert torch.autograd.gradcheck(layer, (x, dropped, parts.a, parts.b))


@pytest.mark.parametrize(("outputs", "inputs"), [(7, 5), (5, 7)])
def test_gradients_are_those_of_finite_differences(outputs: int, inputs: int) -> None:
    parts, base = case(outputs, inputs, bias=True), FrozenWeight((weight(outputs, inputs),), DENSE)

    def layer(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, base, a, b, scale=SCALE, bias=parts.bias)

    assert torch.autograd.gradcheck(layer, (parts.x[:1, :2].detach().requires_grad_(), parts.a, parts.b))


@each_grid
@pytest.mark.parametrize(("outputs", "inputs"), [(160, 128), (128, 160)])
def test_a_4_bit_layer_is_the_formula_of_the_weight_it_stands_for(
    grid: str, nested: bool, outputs: int, inputs: int
) -> None:
    """320 blocks of 64, so that double quantisation has a second block of scales."""
    packed, parts = in_4_bits(outputs, inputs, grid, nested), case(outputs, inputs, dtype=torch.float32)
    frozen = FrozenWeight.of(packed)
    assert frozen is not None
    base = dequantize_4bit(packed, packed.quant_state)
    assert torch.equal(dense(list(frozen.parts), frozen.layout, (outputs, inputs), torch.float32), base)
    assert 0.01 < worst(base, weight(outputs, inputs, torch.float32)) < 0.2, "a grid of 16 values is coarse"
    found, expected = lora_linear(parts.x, frozen, parts.a, parts.b, scale=SCALE), plain(parts, base)
    assert worst(found, expected) < 1e-6
    assert worst(gradients(found, parts), gradients(expected, parts)) < 1e-6


@each_grid
def test_the_offset_and_the_grid_have_a_say(grid: str, nested: bool) -> None:
    """The control: with another grid, or scales that miss their offset, the weight is another."""
    packed = in_4_bits(160, 128, grid, nested)
    frozen = FrozenWeight.of(packed)
    assert frozen is not None
    base, parts = dequantize_4bit(packed, packed.quant_state), list(frozen.parts)
    other = frozen.layout.replace(grid, "fp4" if grid == "nf4" else "nf4")
    assert worst(dense(parts, other, (160, 128), torch.float32), base) > 0.05
    if nested:
        parts[4] = torch.zeros_like(parts[4])
        assert worst(dense(parts, frozen.layout, (160, 128), torch.float32), base) > 0.05


@pytest.mark.parametrize("what", ["scale", "A", "rows", "bias"])
def test_a_wrong_layer_is_told_apart(what: str) -> None:
    parts, base = case(16, 16, bias=True), weight(16, 16)
    wrong = {
        "scale": (parts, base, SCALE * 1.01),
        "A": (parts._replace(a=parts.a.flip(0)), base, SCALE),
        "rows": (parts, base.flip(0), SCALE),
        "bias": (parts._replace(bias=None), base, SCALE),
    }[what]
    found = lora_linear(parts.x, FrozenWeight((base,), DENSE), parts.a, parts.b, scale=SCALE, bias=parts.bias)
    assert worst(found, plain(*wrong)) > 1e-4


def test_inputs_that_ask_for_no_gradient_and_strides_of_any_kind() -> None:
    parts, base = case(24, 16), weight(24, 16)
    strided = parts._replace(x=parts.x.detach().transpose(0, 1))
    results = []
    for y in (
        lora_linear(strided.x, FrozenWeight((base,), DENSE), parts.a, parts.b, scale=SCALE),
        plain(strided, base),
    ):
        # The slope arrives transposed, too.
        shares = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(24, 2, 5)
        results.append((y, *torch.autograd.grad((y.permute(2, 1, 0) * shares).sum(), [parts.a, parts.b])))
    assert worst(*results) < 1e-14


def test_half_precision_inputs_leave_gradients_as_wide_as_what_they_belong_to() -> None:
    parts, base = case(24, 16, dtype=torch.float32), weight(24, 16, torch.bfloat16)
    x = parts.x.detach().bfloat16().requires_grad_()
    y = lora_linear(x, FrozenWeight((base,), DENSE), parts.a, parts.b, scale=SCALE)
    found = gradients(y, parts._replace(x=x))
    assert [tensor.dtype for tensor in (y, *found)] == [torch.bfloat16] * 2 + [torch.float32] * 2
    exact = plain(parts, base.float())
    # Eight bits of mantissa, and sums of few terms.
    assert worst(y.float(), exact) < 0.01
    assert worst(tuple(tensor.float() for tensor in found), gradients(exact, parts)) < 0.01


def test_nothing_of_the_size_of_a_dense_weight_is_kept_for_the_backward_pass() -> None:
    packed, parts = in_4_bits(160, 128, "nf4", True), case(160, 128, dtype=torch.float32)
    frozen = FrozenWeight.of(packed)
    assert frozen is not None
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_linear(parts.x, frozen, parts.a, parts.b, scale=SCALE)
    expected = [part.numel() for part in (parts.x, parts.a, parts.b, *frozen.parts)] + [10 * RANK]
    assert sorted(kept.values()) == sorted(expected)
    assert max(kept.values()) < 160 * 128


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("layout", ["dense", "nf4"])
def test_the_operations_keep_torchs_rules(layout: str) -> None:
    """Schemas, shapes without data, and the registration of the gradient."""
    parts = case(24, 16, bias=True, dtype=torch.float32)
    frozen = FrozenWeight.of(in_4_bits(24, 16, "nf4", False) if layout == "nf4" else weight(24, 16))
    assert frozen is not None
    rows, a, b = parts.x.detach().view(-1, 16), parts.a.detach(), parts.b.detach()
    inner = torch.ops.fine_tune.lora_inner(rows, a, SCALE)
    held, dy = (list(frozen.parts), frozen.layout), torch.ones(10, 24)
    leaves = [tensor.clone().requires_grad_() for tensor in (rows, a, b)]
    ops = torch.ops.fine_tune
    torch.library.opcheck(ops.lora_inner.default, (rows, a, SCALE))
    torch.library.opcheck(ops.lora_linear.default, (leaves[0], inner, *held, *leaves[1:], parts.bias, SCALE))
    torch.library.opcheck(ops.lora_linear_backward.default, (dy, rows, inner, *held, a, b, SCALE))


def test_what_a_parameter_is_described_as() -> None:
    parameter = nn.Parameter(weight(8, 8), requires_grad=False)
    found = FrozenWeight.of(parameter)
    assert found is not None
    assert found.layout == DENSE
    assert found.parts[0] is parameter
    assert dense([parameter], DENSE, (8, 8), torch.float64) is parameter, "no copy of what fits already"
    flat, double = (FrozenWeight.of(in_4_bits(64, 64, "fp4", nested)) for nested in (False, True))
    assert flat is not None
    assert double is not None
    assert (flat.layout, double.layout) == ("fp4/64/0", "fp4/64/256")
    assert [len(flat.parts), len(double.parts)] == [2, 5]


def test_an_unknown_kind_of_weight_is_not_described() -> None:
    class Other(nn.Parameter):
        """Some quantisation of another package."""

    assert FrozenWeight.of(bnb.nn.Int8Params(weight(8, 8, torch.float32), requires_grad=False)) is None
    assert FrozenWeight.of(nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)) is None
    assert FrozenWeight.of(Other(weight(8, 8))) is None
    packed = in_4_bits(64, 64, "nf4", False)
    packed.quant_state.quant_type = "int4"
    assert FrozenWeight.of(packed) is None
