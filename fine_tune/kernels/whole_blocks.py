"""bitsandbytes' 4-bit weights on a CPU, put right where a row is not whole blocks.

Its kernel for CPUs with AVX-512 (0.50, `dequantize_4bit`) starts each row with a block of its own, while weights are quantised in
blocks that run on from row to row: where a row's length is no multiple of the block size it takes the wrong scales, by up to the
largest weight, and says nothing. One long row has no such place.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

OPERATION = "bitsandbytes::dequantize_4bit"


@functools.cache
def read_in_whole_blocks() -> Any:
    """Let every reader of 4-bit weights on a CPU, bitsandbytes' and PEFT's own code included, take the right scales.

    For the whole process and for good; further calls do nothing. Returns bitsandbytes' own kernel, or None where it has none.
    """
    import bitsandbytes  # noqa: F401 - it brings the operation

    if not torch._C._dispatch_has_kernel_for_dispatch_key(OPERATION, "CPU"):
        return None
    kernel: Any = torch.library.get_kernel(OPERATION, "CPU")

    def dequantize(
        keys: Any, packed: Tensor, absmax: Tensor, block: int, grid: str, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        found: Tensor
        if shape[-1] % block == 0:
            found = kernel.call_boxed(keys, packed, absmax, block, grid, shape, dtype)
            return found
        found = kernel.call_boxed(keys, packed, absmax, block, grid, [math.prod(shape)], dtype)
        return found.view(tuple(shape))

    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        # That there was a kernel already is the point.
        warnings.filterwarnings("ignore", message="Warning only once for all operators", category=UserWarning)
        library.impl("dequantize_4bit", dequantize, "CPU", with_keyset=True, allow_override=True)
    _libraries.append(library)
    return kernel


# A library that nothing holds takes its kernels with it.
_libraries: list[torch.library.Library] = []
