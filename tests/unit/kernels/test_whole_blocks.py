"""4-bit weights on a CPU are the formula's, also where a row is not whole blocks, for whoever reads them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type, quantize_4bit
from torch import Tensor

from fine_tune.kernels import frozen_weight
from fine_tune.kernels.whole_blocks import in_whole_blocks, read_in_whole_blocks

BLOCK = 64
# One rounding of the widest product there is; a wrong scale is tenths off.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# What bitsandbytes' kernel for AVX-512 gets wrong: a multiple of 16 that is none of the block size.
WRONG = [(128, 160), (96, 32), (8, 176), (7, 96)]
SHAPES = [*WRONG, (64, 172), (96, 64), (3, 50), (9, 33)]


@pytest.fixture(autouse=True)
def kernel() -> Any:
    return read_in_whole_blocks()


def quantised(shape: tuple[int, int], grid: str = "nf4", dtype: torch.dtype = torch.float32) -> tuple[Tensor, QuantState]:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    return quantize_4bit(weight, blocksize=BLOCK, quant_type=grid)


def formula(packed: Tensor, absmax: Tensor, shape: Sequence[int], grid: str = "nf4", *, mistaken: bool = False) -> Tensor:
    """Look each half byte up and take its block's scale; in float64.

    ``mistaken``: blocks are counted anew in each row, of which only whole ones count.
    """
    rows, columns = torch.arange(shape[0])[:, None], torch.arange(shape[1])
    scales = rows * (shape[1] // BLOCK) + columns // BLOCK if mistaken else (rows * shape[1] + columns) // BLOCK
    halves = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()
    values = get_4bit_type(grid, device="cpu").double()[halves[: shape[0] * shape[1]]]
    return values.view(*shape) * absmax.double()[scales]


def gap(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("grid", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_the_formulas(shape: tuple[int, int], grid: str, dtype: torch.dtype) -> None:
    packed, state = quantised(shape, grid, dtype)
    assert dequantize_4bit(packed, state).dtype == dtype
    assert gap(dequantize_4bit(packed, state), formula(packed, state.absmax, shape, grid)) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", WRONG)
def test_a_kernel_with_the_mistake_is_put_right_on_any_processor(shape: tuple[int, int]) -> None:
    def mistaken(keys: Any, packed: Tensor, absmax: Tensor, block: int, grid: str, rows: Any, dtype: Any) -> Tensor:
        return formula(packed, absmax, rows if len(rows) == 2 else (1, *rows), grid, mistaken=True)

    packed, state = quantised(shape)
    given = (packed, state.absmax, BLOCK, "nf4", shape, torch.float64)
    right = formula(packed, state.absmax, shape)
    assert gap(in_whole_blocks(mistaken)(None, *given), right) == 0.0
    # The control: as it is.
    assert gap(mistaken(None, *given), right) > 0.1


@pytest.mark.skipif(
    sys.platform != "linux" or torch.backends.cpu.get_cpu_capability() != "AVX512", reason="that kernel is Linux' for AVX-512"
)
@pytest.mark.parametrize("shape", WRONG)
def test_bitsandbytes_own_kernel_still_makes_the_mistake(shape: tuple[int, int], kernel: Any) -> None:
    """Fails once a release has put it right; from that release on `whole_blocks` can go."""
    packed, state = quantised(shape)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    found = kernel.call_boxed(keys, packed, state.absmax, BLOCK, "nf4", list(shape), torch.float32)
    assert gap(found, formula(packed, state.absmax, shape, mistaken=True)) < TOLERANCE[torch.float32]


def test_bitsandbytes_layer_multiplies_by_the_formulas_weight() -> None:
    """Values and the input's gradient of its own layer, which holds nothing of ours."""
    torch.manual_seed(3)
    layer: Any = bnb.nn.Linear4bit(160, 24, bias=False, quant_type="nf4", compress_statistics=False)
    layer.support_avx512bf16_for_cpu = False
    layer.to("cpu")
    weight = formula(layer.weight.data, layer.weight.quant_state.absmax, (24, 160))
    x = torch.randn(5, 160, generator=torch.Generator().manual_seed(4)).requires_grad_()
    y = layer(x)
    shares = torch.linspace(-1, 2, y.numel()).view(y.shape)
    (slope,) = torch.autograd.grad((y * shares).sum(), x)
    assert gap(y.detach(), x.detach().double() @ weight.t()) < 1e-5
    assert gap(slope, shares.double() @ weight) < 1e-5


def test_whoever_takes_a_4_bit_weight_apart_has_it_done(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[bool] = []
    monkeypatch.setattr(frozen_weight, "read_in_whole_blocks", lambda: done.append(True))
    frozen_weight.FrozenWeight.of(torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False))
    assert done == []
    layer: Any = bnb.nn.Linear4bit(64, 8, bias=False, quant_type="nf4").to("cpu")
    frozen_weight.FrozenWeight.of(layer.weight)
    assert done == [True]
