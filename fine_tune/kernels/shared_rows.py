"""Gather rows that several sequences share, with a backward pass that adds in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("fine_tune::gather_rows", mutates_args=())
def gather_rows(x: Tensor, index: Tensor, uses: Tensor) -> Tensor:
    """Return ``x[index]``.

    As an operation of its own it is recomputed in the backward pass where that is asked for, and its gradient needs no atomic
    additions, whose order changes from run to run.

    Args:
        x: Rows, ``[T, ...]``.
        index: ``[K]`` int64, which of them.
        uses: ``[M, T]`` int64, where in the result each row went: once at least, and K where it did not go again.
    """
    return x.index_select(0, index)


@gather_rows.register_fake
def _(x: Tensor, index: Tensor, uses: Tensor) -> Tensor:
    return x.new_empty(index.shape[0], *x.shape[1:])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (uses,) = ctx.saved_tensors
    # Plain operations, which a compiler joins into one. Who is used once takes some other row times zero.
    total = grad.index_select(0, uses[0])
    for further in uses[1:]:
        again = (further < grad.shape[0]).view(-1, *[1] * (grad.ndim - 1))
        total = total + grad.index_select(0, further.clamp(max=grad.shape[0] - 1)) * again
    return total, None, None


gather_rows.register_autograd(_backward, setup_context=_keep)
