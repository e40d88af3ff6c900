"""How torch's CUDA allocator takes memory from the device; decided before torch is loaded."""

from __future__ import annotations

import os

# Two names of one variable; torch reads it when CUDA starts.
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def let_segments_grow() -> None:
    """Let pieces of device memory grow instead of lying beside each other, unless the user has set the allocator up.

    Micro-batches differ in size, and pieces of one size do not serve the next: 58 GB were reserved for 40 in use, and 40 with
    this (docs/experiments.md).
    """
    if not any(name in os.environ for name in VARIABLES):
        os.environ[VARIABLES[0]] = "expandable_segments:True"
