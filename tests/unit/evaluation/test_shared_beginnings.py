from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from fine_tune.evaluation.shared_beginnings import common_beginning, share_beginnings

from .test_choices import prompts


def test_groups_are_found_by_what_rows_begin_with() -> None:
    rows = [prompt.ids for prompt in prompts()]
    groups = share_beginnings(rows, pass_cost=8)
    assert groups == [(20, (0, 2, 4, 6, 7, 9)), (12, (1, 5, 8)), (0, (3,))]
    assert common_beginning(rows[0], rows[2]) == 20
    # A pass that costs more than it saves is not made.
    assert share_beginnings(rows, pass_cost=30) == [(20, (0, 2, 4, 6, 7, 9)), (0, (1, 3, 5, 8))]
    assert share_beginnings([]) == []


def saved(rows: list[np.ndarray], groups: list[tuple[int, ...]], cost: int) -> int:
    total = 0
    for group in groups:
        if len(group) > 1:
            common = min(common_beginning(rows[a], rows[b]) for a, b in combinations(group, 2))
            total += (len(group) - 1) * common - cost if common else 0
    return total


def partitions(members: list[int]) -> list[list[tuple[int, ...]]]:
    if not members:
        return [[]]
    head, rest = members[0], members[1:]
    found = []
    for size in range(len(rest) + 1):
        for others in combinations(rest, size):
            left = [m for m in rest if m not in others]
            found += [[(head, *others), *more] for more in partitions(left)]
    return found


@pytest.mark.parametrize("seed", range(8))
def test_no_division_saves_more(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows = [generator.integers(0, 2, generator.integers(3, 9)) for _ in range(6)]
    best = max(saved(rows, groups, 2) for groups in partitions(list(range(6))))
    ours = [group.members for group in share_beginnings(rows, pass_cost=2) if group.length]
    assert saved(rows, ours, 2) == best
