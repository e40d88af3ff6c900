"""bitsandbytes' 4-bit weights on a CPU, put right where a row is not whole blocks.

Weights are quantised in blocks that run on from row to row. The AVX-512 kernel of bitsandbytes 0.50 for Linux
(``dequantize_4bit``) counts blocks anew in each row, of which it takes the whole ones: where a row's length is a multiple of 16
but not of the block size, it reads scales of other blocks and says nothing. Handed over as rows of one block each, the same
values have no such place.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

OPERATION = "bitsandbytes::dequantize_4bit"


@functools.cache
def read_in_whole_blocks() -> Any:
    """Let every reader of 4-bit weights on a CPU, bitsandbytes' and PEFT's own code included, take the right scales.

    For the whole process and for good; further calls do nothing.

    Returns:
        bitsandbytes' own kernel, or None where it has none for CPUs.
    """
    import bitsandbytes  # noqa: F401 - it brings the operation

    if not torch._C._dispatch_has_kernel_for_dispatch_key(OPERATION, "CPU"):
        return None
    kernel: Any = torch.library.get_kernel(OPERATION, "CPU")
    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        # That there was a kernel already is the point.
        warnings.filterwarnings("ignore", message="Warning only once for all operators", category=UserWarning)
        library.impl("dequantize_4bit", in_whole_blocks(kernel.call_boxed), "CPU", with_keyset=True, allow_override=True)
    _libraries.append(library)
    return kernel


# A library that nothing holds takes its kernels with it.
_libraries: list[torch.library.Library] = []


def in_whole_blocks(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a kernel that hands ``kernel`` no row that ends within a block, but the last of all."""

    def dequantize(
        keys: Any, packed: Tensor, absmax: Tensor, block: int, grid: str, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        total, rows = math.prod(shape), list(shape)
        if shape[-1] % block:
            # Kernels divide rows among threads; only what ends within a block goes as one.
            rows = [total] if total % block else [total // block, block]
        return kernel(keys, packed, absmax, block, grid, rows, dtype).view(tuple(shape))

    return dequantize
