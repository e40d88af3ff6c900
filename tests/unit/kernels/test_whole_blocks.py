"""4-bit weights on a CPU are the formula's, also where a row is not whole blocks, for whoever reads them."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type, quantize_4bit
from torch import Tensor

from fine_tune.kernels.whole_blocks import read_in_whole_blocks

BLOCK = 64
# One rounding of the widest product there is; a wrong scale is tenths off.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SHAPES = [(128, 160), (64, 172), (96, 64), (7, 96), (3, 50), (9, 33)]


@pytest.fixture(autouse=True)
def kernel() -> Any:
    return read_in_whole_blocks()


def quantised(shape: tuple[int, int], grid: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, QuantState]:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    return quantize_4bit(weight, blocksize=BLOCK, quant_type=grid)


def formula(packed: Tensor, state: QuantState, *, rows_begin_blocks: bool = False) -> Tensor:
    """Look each half byte up and take its block's scale; in float64.

    ``rows_begin_blocks``: the mistake, of blocks counted from each row's first value.
    """
    halves = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()
    rows, columns = state.shape
    place = torch.arange(rows * columns)
    if rows_begin_blocks:
        place = (torch.arange(rows)[:, None] * columns + torch.arange(columns) // BLOCK * BLOCK).flatten()
    table = get_4bit_type(state.quant_type, device="cpu").double()
    values = table[halves[: rows * columns]] * state.absmax.double()[place // BLOCK]
    return values.view(rows, columns)


def gap(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("grid", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_the_formulas(shape: tuple[int, int], grid: str, dtype: torch.dtype) -> None:
    packed, state = quantised(shape, grid, dtype)
    assert dequantize_4bit(packed, state).dtype == dtype
    assert gap(dequantize_4bit(packed, state), formula(packed, state)) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(128, 160), (64, 172), (7, 96), (3, 50)])
def test_control_blocks_that_begin_with_each_row(shape: tuple[int, int]) -> None:
    packed, state = quantised(shape, "nf4")
    wrong = formula(packed, state, rows_begin_blocks=True)
    assert gap(wrong, formula(packed, state)) > 100 * TOLERANCE[torch.float32]
    assert gap(formula(*quantised((96, 64), "nf4"), rows_begin_blocks=True), formula(*quantised((96, 64), "nf4"))) == 0.0


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the kernel is that of CPUs with AVX-512")
def test_bitsandbytes_own_kernel_still_needs_it(kernel: Any) -> None:
    """Fails once a release has put it right, and then `whole_blocks` can go."""
    packed, state = quantised((128, 160), "nf4")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    found = kernel.call_boxed(keys, packed, state.absmax, BLOCK, "nf4", [128, 160], torch.float32)
    assert gap(found, formula(packed, state)) > 0.1


def test_bitsandbytes_layer_multiplies_by_the_formulas_weight() -> None:
    """Values and the input's gradient of its own layer, which holds nothing of ours."""
    torch.manual_seed(3)
    layer: Any = bnb.nn.Linear4bit(160, 24, bias=False, quant_type="nf4", compress_statistics=False)
    layer.support_avx512bf16_for_cpu = False
    layer.to("cpu")
    weight = formula(layer.weight.data, layer.weight.quant_state)
    x = torch.randn(5, 160, generator=torch.Generator().manual_seed(4)).requires_grad_()
    y = layer(x)
    shares = torch.linspace(-1, 2, y.numel()).view(y.shape)
    (slope,) = torch.autograd.grad((y * shares).sum(), x)
    assert gap(y.detach(), x.detach().double() @ weight.t()) < 1e-5
    assert gap(slope, shares.double() @ weight) < 1e-5


def test_it_is_done_once(kernel: Any) -> None:
    assert read_in_whole_blocks() is kernel
