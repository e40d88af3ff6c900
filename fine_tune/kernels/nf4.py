"""Triton kernel: 4-bit weights to half precision in one pass, scales of double quantisation included.

bitsandbytes takes three: the scales to float32, the offset, and the values.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
# Quantisation blocks that one program works on.
BLOCKS_PER_PROGRAM = 64


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize(  # type: ignore[no-untyped-def]
    packed, scales, codebook, nested_scales, offset, grid_values, out, num_blocks,
    NESTED_BLOCK: tl.constexpr, BLOCKS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < num_blocks
    scale = tl.load(scales + block, mask=inside, other=0)
    if NESTED_BLOCK > 0:
        coarse = tl.load(nested_scales + block // NESTED_BLOCK, mask=inside, other=0.0)
        scale = tl.load(codebook + scale.to(tl.int32)) * coarse + tl.load(offset)
    column = tl.arange(0, HALF)[None, :]
    pair = tl.load(packed + block[:, None] * HALF + column, mask=inside[:, None], other=0).to(tl.int32)
    # The first of two values is in the high half of its byte.
    values = tl.interleave(tl.load(grid_values + (pair >> 4)), tl.load(grid_values + (pair & 15))) * scale[:, None]
    place = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(out + place, values.to(out.dtype.element_ty), mask=inside[:, None])


def dequantize_into(out: Tensor, parts: list[Tensor], *, grid: str, nested_block: int) -> None:
    """Write the weight that ``parts`` stand for (see ``FrozenWeight``) into ``out``, contiguous, in blocks of 64."""
    num_blocks = out.numel() // BLOCK
    values = _grid_values(grid, out.device)
    codebook, nested_scales, offset = (parts[2], parts[3], parts[4]) if nested_block else (values, values, values)
    programs = (triton.cdiv(num_blocks, BLOCKS_PER_PROGRAM),)
    with torch.cuda.device(out.device):
        _dequantize[programs](
            parts[0], parts[1], codebook, nested_scales, offset, values, out, num_blocks,
            nested_block, BLOCKS_PER_PROGRAM, BLOCK // 2, num_warps=4,
            # A fused multiply-add would round the scales otherwise than bitsandbytes does.
            enable_fp_fusion=False,
        )  # fmt: skip


@functools.cache
def _grid_values(grid: str, device: torch.device) -> Tensor:
    from bitsandbytes.functional import get_4bit_type

    values: Tensor = get_4bit_type(grid, device=device).float().contiguous()  # type: ignore[no-untyped-call]
    return values
