"""A 4-bit weight that does not train: values and the input's gradient, and what is kept between the passes."""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn

from fine_tune.kernels.frozen_linear import frozen_linear
from fine_tune.kernels.frozen_weight import DENSE, FrozenWeight, dense
from fine_tune.models.fused_lora import fuse_frozen

INPUTS, OUTPUTS = 128, 192


def holder(*, grid: str = "nf4", nested: bool = True, bias: bool = False, dtype: torch.dtype = torch.float32) -> bnb.nn.Linear4bit:
    torch.manual_seed(3)
    layer = bnb.nn.Linear4bit(
        INPUTS, OUTPUTS, bias=bias, quant_type=grid, compress_statistics=nested, compute_dtype=dtype
    )
    layer.support_avx512bf16_for_cpu = False
    layer.requires_grad_(False)
    return layer.to("cpu")


def leaf(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, INPUTS, generator=torch.Generator().manual_seed(4)).to(dtype).requires_grad_()


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def shares(y: Tensor) -> Tensor:
    """Another weight for each output, so that a mixed-up one shows."""
    return torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("grid", "nested"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_values_and_gradients_are_the_formulas(grid: str, nested: bool, bias: bool) -> None:
    layer = holder(grid=grid, nested=nested, bias=bias)
    weight = dequantize_4bit(layer.weight, layer.weight.quant_state).double()
    frozen = FrozenWeight.of(layer.weight)
    assert frozen is not None
    x = leaf()
    y = frozen_linear(x, frozen, OUTPUTS, bias=layer.bias)
    (slope,) = torch.autograd.grad((y * shares(y)).sum(), x)
    wide = x.detach().double().requires_grad_()
    expected = wide @ weight.t() + (0 if layer.bias is None else layer.bias.double())
    (wanted,) = torch.autograd.grad((expected * shares(expected)).sum(), wide)
    assert max(distance(y, expected), distance(slope, wanted)) < 1e-6
    assert distance(slope, wanted.flip(-1)) > 0.1


def test_a_dense_weight_is_exact_in_float64() -> None:
    weight = torch.randn(OUTPUTS, INPUTS, dtype=torch.float64)
    x = leaf(torch.float64)
    y = frozen_linear(x, FrozenWeight((weight,), DENSE), OUTPUTS)
    (slope,) = torch.autograd.grad((y * shares(y)).sum(), x)
    assert distance(y, x.detach() @ weight.t()) < 1e-14
    assert distance(slope, shares(y) @ weight) < 1e-14


def test_the_operation_is_what_torch_expects_of_one() -> None:
    weight = torch.randn(OUTPUTS, INPUTS, dtype=torch.float64)
    rows = leaf(torch.float64).detach().view(-1, INPUTS).requires_grad_()
    torch.library.opcheck(torch.ops.fine_tune.frozen_linear.default, (rows, [weight], DENSE, OUTPUTS, None))


class Block(nn.Module):
    """Something that trains, then a product with a frozen weight."""

    def __init__(self, last: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gain, self.last = nn.Parameter(torch.ones(INPUTS)), last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x * self.gain).tanh()


def kept_bytes(block: Block, frozen: FrozenWeight) -> tuple[int, Tensor, Tensor]:
    """Bytes that the compiled block keeps for its backward pass, stored weights left out; its result and gradient."""
    torch._dynamo.reset()
    own = {one.data_ptr() for one in (*block.parameters(), *frozen.parts)}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = torch.compile(block, backend="aot_eager_decomp_partition")(leaf())
    (y * shares(y)).sum().backward()
    assert block.gain.grad is not None
    return sum(kept.values()), y.detach(), block.gain.grad


# Torch's own, about what it imports when it compiles.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiler_does_not_keep_the_dense_weight() -> None:
    layer = holder()
    frozen = FrozenWeight.of(layer.weight)
    assert frozen is not None
    assert fuse_frozen(nn.Sequential(layer)) == 1
    ours, y, slope = kept_bytes(Block(layer), frozen)
    dense_bytes = 4 * INPUTS * OUTPUTS
    assert ours < dense_bytes / 4
    # Control: made dense before the product, it is kept, and the figures are the same.
    weight = dense(list(frozen.parts), frozen.layout, (OUTPUTS, INPUTS), torch.float32).requires_grad_()
    control, expected, wanted = kept_bytes(Block(lambda x: x @ (1.0 * weight).t()), frozen)
    assert control >= dense_bytes
    assert distance(y, expected) < 1e-6
    assert distance(slope, wanted) < 1e-5


def test_without_a_backward_pass_bitsandbytes_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = holder()
    x = leaf().detach()
    expected = layer(x)
    fuse_frozen(nn.Sequential(layer))
    monkeypatch.setattr("fine_tune.models.fused_lora.frozen_linear", None)
    assert torch.equal(layer(x), expected)
    with pytest.raises(TypeError):
        layer(leaf())


def test_results_have_the_inputs_dtype() -> None:
    layer = holder(dtype=torch.bfloat16)
    fuse_frozen(nn.Sequential(layer))
    x = leaf()
    assert layer(x).dtype == torch.float32
    assert 1e-4 < distance(layer(x), holder()(x.detach())) < 2e-2, "computed in bfloat16"
