"""A frozen weight as plain tensors: dense, or 4-bit with its scales, so that compiled graphs and custom ops take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fine_tune.kernels.capability import is_ampere
from fine_tune.kernels.whole_blocks import read_in_whole_blocks

DENSE = "dense"


@dataclass(frozen=True)
class FrozenWeight:
    """The weight ``[N, K]`` of a linear layer that does not train.

    Attributes:
        parts: The weight itself; or its packed 4-bit values, two to a byte, and their scales: ``absmax`` per block, and with
            double quantisation ``absmax`` in 8 bits, the 256 values that these stand for, their own scales and the offset.
        layout: ``dense``; or grid, block size and block size of the scales, as in ``nf4/64/256``; 0 for plain scales.
    """

    parts: tuple[Tensor, ...]
    layout: str

    @classmethod
    def of(cls, weight: Any) -> FrozenWeight | None:
        """Describe a parameter; None for a kind of quantisation that is not known here."""
        state = getattr(weight, "quant_state", None)
        if state is None:
            plain = type(weight) in (torch.nn.Parameter, Tensor) and weight.is_floating_point()
            return cls((weight,), DENSE) if plain else None
        if state.quant_type not in ("nf4", "fp4") or state.absmax is None:
            return None
        # Merging quantises weights of its own, without a base that was loaded.
        read_in_whole_blocks()
        if state.state2 is None:
            return cls((weight, state.absmax), f"{state.quant_type}/{state.blocksize}/0")
        nested = (weight, state.absmax, state.state2.code, state.state2.absmax, state.offset)
        return cls(nested, f"{state.quant_type}/{state.blocksize}/{state.state2.blocksize}")


def dense(parts: list[Tensor], layout: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return the weight in ``dtype``; a dense one that has it already is returned as it is.

    Source: 4-bit NormalFloat and double quantisation, Dettmers et al. 2023 (arXiv:2305.14314), section 3.
    """
    if layout == DENSE:
        return parts[0].to(dtype)
    grid, block, nested_block = layout.split("/")
    out = torch.empty(shape, dtype=dtype, device=parts[0].device)
    if _triton_serves(out, int(block)):
        from fine_tune.kernels.nf4 import dequantize_into

        dequantize_into(out, parts, grid=grid, nested_block=int(nested_block))
        return out
    absmax = parts[1]
    if int(nested_block):
        absmax = torch.ops.bitsandbytes.dequantize_blockwise(absmax, parts[3], parts[2], int(nested_block), torch.float32)
        absmax += parts[4]
    found: Tensor = torch.ops.bitsandbytes.dequantize_4bit(parts[0], absmax, int(block), grid, shape, dtype)
    return found


def _triton_serves(out: Tensor, block: int) -> bool:
    """Our kernel is made for blocks of 64 in half precision, and Triton for Ampere; all else goes to bitsandbytes."""
    if not (is_ampere(out.device) and block == 64 and out.shape[1] % 64 == 0) or out.dtype not in (torch.bfloat16, torch.float16):
        return False
    return has_triton()


def has_triton() -> bool:
    """Tell whether Triton is installed."""
    from torch.utils._triton import has_triton_package

    return bool(has_triton_package())
