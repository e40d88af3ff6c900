"""A micro-batch is taken apart into what it was packed from, and its halves are the same work."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fine_tune.packing.batches import MicroBatch, Sample, pack
from fine_tune.packing.halves import at_most, halves, unpack


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    size = draw(st.integers(2, 12))
    ids = np.array(draw(st.lists(st.integers(0, 5), min_size=size, max_size=size)))
    mask = np.array([False, *draw(st.lists(st.booleans(), min_size=size - 1, max_size=size - 1))])
    branches: tuple[int, ...] = ()
    if size >= 4 and draw(st.booleans()):
        places = draw(st.sets(st.integers(1, size - 1), min_size=2, max_size=3))
        branches = tuple(sorted(places))
        mask[: branches[0]] = False
    return Sample(ids, mask, branches)


def assert_equal(one: Sample, other: Sample) -> None:
    assert one.input_ids.tolist() == other.input_ids.tolist()
    assert one.loss_mask.tolist() == other.loss_mask.tolist()
    assert one.branches == other.branches


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(samples(), min_size=1, max_size=6))
def test_unpacking_gives_back_what_was_packed(rows: list[Sample]) -> None:
    for one, other in zip(unpack(pack(rows)), rows, strict=True):
        assert_equal(one, other)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(samples(), min_size=2, max_size=8), st.integers(1, 40))
def test_halves_hold_every_sample_once_and_in_order(rows: list[Sample], tokens: int) -> None:
    micro = pack(rows, [10 * i for i in range(len(rows))])
    first, second = halves(micro)
    assert first.samples + second.samples == micro.samples
    assert first.samples
    assert second.samples
    for one, other in zip(unpack(first) + unpack(second), rows, strict=True):
        assert_equal(one, other)
    parts = at_most([micro], tokens)
    assert sum((part.samples for part in parts), ()) == micro.samples
    assert all(part.num_tokens <= tokens or len(part.samples) == 1 for part in parts)
    assert torch.equal(torch.cat([part.targets for part in parts]), micro.targets)
    assert torch.equal(torch.cat([part.completion_tokens for part in parts]), micro.completion_tokens)


def test_halves_are_about_equal() -> None:
    rows = [Sample(np.arange(size), np.arange(size) > 0) for size in (5, 5, 6, 4, 10)]
    first, second = halves(pack(rows))
    assert abs(first.num_tokens - second.num_tokens) <= 10
    long_last = halves(pack([Sample(np.arange(2), np.arange(2) > 0), Sample(np.arange(50), np.arange(50) > 0)]))
    assert [part.num_tokens for part in long_last] == [2, 50]


@pytest.mark.parametrize("tokens", [None, 3])
def test_one_sample_stays_whole(tokens: int | None) -> None:
    micro = pack([Sample(np.arange(9), np.arange(9) > 3)])
    assert halves(micro) == [micro]
    assert at_most([micro], tokens) == [micro]


def test_two_branches_that_begin_alike_are_told_apart() -> None:
    """Both first tokens are predicted by the prefix's last one, and only the second's is trained."""
    mask = np.array([0, 0, 0, 1, 1, 1], bool)
    row = Sample(np.array([1, 2, 7, 8, 7, 8]), mask, (2, 4))
    [back] = unpack(pack([row]))
    assert_equal(back, row)
    assert isinstance(pack([row]), MicroBatch)
