"""Rows of tokens divided by what they begin with, so that the fewest tokens are computed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

# What a pass of its own costs, in tokens: below this a shared beginning is cheaper read again.
PASS_COST_TOKENS = 64


class Shared(NamedTuple):
    """Rows that begin with the same ``length`` tokens."""

    length: int
    members: tuple[int, ...]


def share_beginnings(rows: Sequence[np.ndarray], *, pass_cost: int = PASS_COST_TOKENS) -> list[Shared]:
    """Group rows by what they begin with, so that the fewest tokens are computed.

    A group of n rows that share p tokens saves ``(n - 1) * p`` and costs a pass. In lexicographic order rows with a common
    beginning are neighbours, so the best division of that order is the best of all. Rows without a partner come last, as
    one group of length 0.
    """
    # Big-endian bytes sort as the numbers do.
    order = sorted(range(len(rows)), key=lambda i: rows[i].astype(">u4").tobytes())
    common = [common_beginning(rows[a], rows[b]) for a, b in pairwise(order)]
    saved, cut = [0], [0]
    for end in range(1, len(order) + 1):
        best, start = saved[end - 1], end - 1
        length = None
        for first in range(end - 2, -1, -1):
            length = common[first] if length is None else min(length, common[first])
            if length == 0:
                break
            gain = saved[first] + (end - first - 1) * length - pass_cost
            if gain >= best:
                best, start = gain, first
        saved.append(best)
        cut.append(start)
    groups, end = [], len(order)
    while end:
        groups.append(order[cut[end] : end])
        end = cut[end]
    shared = [Shared(_shared_length(rows, group), tuple(sorted(group))) for group in groups if len(group) > 1]
    alone = sorted(group[0] for group in groups if len(group) == 1)
    return sorted(shared, key=lambda one: one.members) + ([Shared(0, tuple(alone))] if alone else [])


def _shared_length(rows: Sequence[np.ndarray], group: Sequence[int]) -> int:
    # First and last in order differ earliest.
    return common_beginning(rows[group[0]], rows[group[-1]])


def common_beginning(first: np.ndarray, second: np.ndarray) -> int:
    """Count the tokens before two rows differ.

    Example:
        >>> common_beginning(np.array([1, 2, 3]), np.array([1, 2, 4, 5]))
        2
    """
    size = min(len(first), len(second))
    different = np.flatnonzero(first[:size] != second[:size])
    return int(different[0]) if len(different) else size
