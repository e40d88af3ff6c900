"""Which samples form optimizer step n, and how each rank packs them: pure functions, so resuming needs no state."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step.

    ``micro_batches[rank]`` lists that rank's micro-batches, each a tuple of sample indices.
    """

    step: int
    epoch: int
    samples: tuple[int, ...]
    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True)
class Planner:
    """Decide the samples and micro-batches of any optimizer step from its number alone.

    Args (units): ``lengths`` in tokens per sample; ``global_batch_size`` in samples per optimizer step over all
    ranks; ``micro_batch_tokens`` in tokens per forward pass of one rank. The last step of an epoch holds what is left.

    Source: an order that is a function of (seed, epoch) and survives any change of workers is the idea of elastic
    determinism in mosaicml/streaming; best-fit-decreasing packing is Johnson 1973.
    """

    lengths: Sequence[int]
    seed: int
    global_batch_size: int
    micro_batch_tokens: int
    num_ranks: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be planned."""
        longest = max(self.lengths, default=0)
        if longest > self.micro_batch_tokens:
            raise ValueError(
                f"trainer.micro_batch_tokens={self.micro_batch_tokens}: must hold the longest sample of {longest} tokens. "
                "Raise it, or lower data.max_seq_len."
            )
        if self.global_batch_size < 1 or not len(self.lengths):
            raise ValueError(f"cannot plan {len(self.lengths)} samples in steps of {self.global_batch_size}.")

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every sample is seen once."""
        return -(-len(self.lengths) // self.global_batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """Return this epoch's permutation of all samples, a function of (seed, epoch)."""
        return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(self.lengths))

    def step(self, number: int) -> StepPlan:
        """Plan optimizer step ``number``, counted from 0 over the whole run."""
        epoch, within = divmod(number, self.steps_per_epoch)
        first = within * self.global_batch_size
        samples = tuple(int(s) for s in self.order(epoch)[first : first + self.global_batch_size])
        return StepPlan(number, epoch, samples, self._spread(samples))

    def _spread(self, samples: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Give the step's bins to ranks, the fullest bin to the emptiest rank; a rank may get none."""
        # Over several ranks best_fit makes even shares itself, and as many bins as even shares need.
        fit = even_fit if self.num_ranks == 1 else best_fit
        bins = fit([self.lengths[s] for s in samples], self.micro_batch_tokens, self.num_ranks)
        loads = [0] * self.num_ranks
        shares: list[list[tuple[int, ...]]] = [[] for _ in range(self.num_ranks)]
        for members in sorted(bins, key=lambda b: -sum(self.lengths[samples[i]] for i in b)):
            rank = loads.index(min(loads))
            loads[rank] += sum(self.lengths[samples[i]] for i in members)
            shares[rank].append(tuple(samples[i] for i in sorted(members)))
        return tuple(tuple(share) for share in shares)


def even_fit(lengths: Sequence[int], capacity: int, min_bins: int = 1) -> list[list[int]]:
    """Pack items into as few bins as :func:`best_fit` needs, about equally full.

    A full bin beside a small rest takes as many passes but more memory at the peak.
    """
    bins = best_fit(lengths, capacity, min_bins)
    level = max(max(lengths), -(-sum(lengths) // len(bins)))
    while level < capacity:
        found = best_fit(lengths, level, min_bins)
        if len(found) <= len(bins):
            return found
        level += max(1, capacity // 64)
    return bins


def best_fit(lengths: Sequence[int], capacity: int, min_bins: int = 1) -> list[list[int]]:
    """Pack items into bins of ``capacity``: longest first, each into the fullest bin that still holds it.

    With several ranks the capacity shrinks to an even share first, so that every rank has work.
    """
    total = sum(lengths)
    if min_bins > 1:
        capacity = min(capacity, max(max(lengths), -(-total // min_bins)))
    free: list[tuple[int, int]] = []
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        slot = bisect_left(free, (lengths[item], -1))
        if slot == len(free):
            bins.append([item])
            left = (capacity - lengths[item], len(bins) - 1)
        else:
            room, index = free.pop(slot)
            bins[index].append(item)
            left = (room - lengths[item], index)
        insort(free, left)
    return bins
