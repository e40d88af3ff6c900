"""The batch that a step is made of: packed micro-batches and the loss denominator of the whole step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fine_tune.packing.segments import Segments, Span


class Sample(NamedTuple):
    """One row to pack.

    ``input_ids`` and ``loss_mask`` are ``[L]``; True in the mask means that the token is trained. ``branches`` are the
    starts of completions that all continue the tokens before the first of them; none means one plain sequence.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    branches: tuple[int, ...] = ()


@dataclass
class MicroBatch:
    """Samples laid end to end.

    Shapes: T tokens in all, N of them supervised, in C completions (one per plain sample, one per branch otherwise).

    Attributes:
        input_ids: ``[1, T]`` int64.
        position_ids: ``[1, T]`` int64, from 0 in each sequence; a branch counts on from the prefix it continues.
        segments: Where each sequence begins and ends, and what it continues.
        rows: ``[N]`` int64, the positions whose hidden state predicts a supervised token.
        targets: ``[N]`` int64, those tokens, completion after completion.
        completion_tokens: ``[C]`` int64, supervised tokens of each completion.
        samples: Index of each sample in its table, in order.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Segments
    rows: Tensor
    targets: Tensor
    completion_tokens: Tensor
    samples: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Real tokens; there are no others."""
        return self.input_ids.shape[1]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MicroBatch:
        """Move every tensor."""
        move = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in _TENSORS}
        return MicroBatch(**move, segments=self.segments.to(device, non_blocking), samples=self.samples)

    def pin_memory(self) -> MicroBatch:
        """Pin every tensor, so that copies to the device overlap with work."""
        pinned = {name: getattr(self, name).pin_memory() for name in _TENSORS}
        return MicroBatch(**pinned, segments=self.segments.pin_memory(), samples=self.samples)


_TENSORS = ("input_ids", "position_ids", "rows", "targets", "completion_tokens")


@dataclass
class StepBatch:
    """One optimizer step on one rank.

    ``num_supervised`` and ``num_samples`` count the *whole* step over all ranks; ``micro_batches`` are this rank's and
    may be empty.
    """

    step: int
    epoch: int
    micro_batches: list[MicroBatch]
    num_supervised: int
    num_samples: int
    num_tokens: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> StepBatch:
        """Move every micro-batch."""
        moved = [micro.to(device, non_blocking) for micro in self.micro_batches]
        return StepBatch(self.step, self.epoch, moved, self.num_supervised, self.num_samples, self.num_tokens)

    def pin_memory(self) -> StepBatch:
        """Pin every micro-batch."""
        pinned = [micro.pin_memory() for micro in self.micro_batches]
        return StepBatch(self.step, self.epoch, pinned, self.num_supervised, self.num_samples, self.num_tokens)


def pack(samples: Sequence[Sample | tuple[np.ndarray, np.ndarray]], indices: Sequence[int] | None = None) -> MicroBatch:
    """Lay samples end to end; a prefix that several completions continue is laid down once.

    Args:
        samples: What to pack. The first token of a sample is predicted by nothing and must not be trained.
        indices: The samples' numbers, for messages; 0, 1, ... by default.

    Raises:
        ValueError: A sample is empty, supervises its first token, or has branches that are not in its tokens.
    """
    rows = [Sample(*sample) for sample in samples]
    for position, sample in enumerate(rows):
        _check(position, sample)
    starts = np.cumsum([0, *(len(sample.input_ids) for sample in rows)])[:-1].tolist()
    layouts = [_layout(sample, start) for sample, start in zip(rows, starts, strict=True)]
    tokens = torch.from_numpy(np.concatenate([sample.input_ids for sample in rows]).astype(np.int64))
    supervised = torch.from_numpy(np.concatenate([sample.loss_mask for sample in rows]).astype(bool))
    before = torch.cat([layout.before for layout in layouts])
    return MicroBatch(
        input_ids=tokens[None],
        position_ids=torch.cat([layout.positions for layout in layouts])[None],
        segments=Segments.from_spans([span for layout in layouts for span in layout.spans]),
        rows=before[supervised],
        targets=tokens[supervised],
        completion_tokens=torch.tensor([count for layout in layouts for count in layout.completion_tokens]),
        samples=tuple(range(len(rows)) if indices is None else indices),
    )


class _Layout(NamedTuple):
    """How one sample lies in the micro-batch; ``before`` is the place of the token in front of each token."""

    spans: list[Span]
    positions: Tensor
    before: Tensor
    completion_tokens: list[int]


def _layout(sample: Sample, start: int) -> _Layout:
    size = len(sample.input_ids)
    positions = torch.arange(size)
    before = positions + start - 1
    if not sample.branches:
        return _Layout([Span(start, size)], positions, before, [int(sample.loss_mask.sum())])
    prefix = sample.branches[0]
    bounds = list(pairwise([*sample.branches, size]))
    # The first completion follows its prefix as in any text; the others lie behind and continue the same prefix.
    spans = [Span(start, bounds[0][1])]
    for first, end in bounds[1:]:
        spans.append(Span(start + first, end - first, start, prefix))
        positions[first:end] -= first - prefix
        before[first] = start + prefix - 1
    return _Layout(spans, positions, before, [int(sample.loss_mask[a:b].sum()) for a, b in bounds])


def _check(position: int, sample: Sample) -> None:
    size = len(sample.input_ids)
    if not size or sample.loss_mask[0]:
        raise ValueError(f"sample {position} of {size} tokens: empty, or its first token is supervised.")
    bounds = [0, *sample.branches, size]
    if sample.branches and any(a >= b for a, b in pairwise(bounds)):
        raise ValueError(f"sample {position} of {size} tokens: its branches {sample.branches} do not divide it.")
    if sample.branches and sample.loss_mask[: sample.branches[0]].any():
        raise ValueError(f"sample {position}: the prefix that its branches share is supervised.")
