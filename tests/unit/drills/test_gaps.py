"""What counts as the same, and how far apart is what does not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fine_tune.drills.gaps import LEAST, gap, lines_gap, number_gap, tensor_gap


def test_the_same_state_is_nothing_apart_and_is_counted() -> None:
    state = {"a": torch.arange(4.0), "b": [1, 2.5, "x", None], "c": {"d": torch.tensor(3)}}
    again = {"a": torch.arange(4.0), "b": [1, 2.5, "x", None], "c": {"d": torch.tensor(3)}}
    assert gap(state, again) == (0.0, "", 6)


def test_a_difference_is_relative_to_the_norm_and_is_named() -> None:
    left, right = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    found = gap({"one": torch.ones(2), "state": [{"step": left}]}, {"one": torch.ones(2), "state": [{"step": right}]})
    assert found.size == pytest.approx(0.1)
    assert found.where == "state[0].step"


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ({"a": 1}, {"b": 1}), ([1], [1, 2]), (torch.ones(2), torch.ones(3)), (torch.ones(2), torch.ones(2).double()),
        (1, 2), ("a", "b"), (1, 1.0), (torch.tensor([1.0]), torch.tensor([math.nan])), (torch.zeros(1), torch.ones(1)),
        (1.0, math.inf),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_infinitely_far(left: Any, right: Any) -> None:
    assert gap(left, right).size == math.inf


def test_one_bit_is_a_difference() -> None:
    assert tensor_gap(torch.tensor([0.0]), torch.tensor([-0.0])) == LEAST > 0
    assert number_gap(0.0, -0.0) == LEAST
    left = torch.ones(1000)
    right = left.clone()
    right[7] = torch.nextafter(right[7], torch.tensor(2.0))
    assert 0 < tensor_gap(left, right) < 1e-8
    assert tensor_gap(torch.tensor([math.nan]), torch.tensor([math.nan])) == 0.0


def line(step: int, loss: float, rate: float = 1e-3, seconds: float = 1.0) -> dict[str, Any]:
    return {"step": step, "train/loss": loss, "learning_rate": rate, "step_seconds": seconds}


COUNTS = frozenset({"step", "learning_rate"})


def test_lines_are_compared_by_kind_each_number_against_the_largest_of_its_name() -> None:
    left = [line(1, 4.0), line(2, 1e-9)]
    right = [line(1, 4.0, seconds=9.0), line(2, 2e-9)]
    exact = lines_gap(left, right, keys=COUNTS, only=True)
    assert (exact.size, exact.compared) == (0.0, 4)
    found = lines_gap(left, right, keys=COUNTS | {"step_seconds"}, only=False)
    assert found.size == pytest.approx(1e-9 / 4.0)
    assert found.where == "train/loss of step 2"


def test_a_rate_or_a_line_that_is_gone_is_found() -> None:
    left = [line(1, 4.0), line(2, 3.0)]
    changed = lines_gap(left, [line(1, 4.0), line(2, 3.0, rate=2e-3)], keys=COUNTS, only=True)
    assert changed.where == "learning_rate of step 2"
    assert changed.size == pytest.approx(1.0)
    assert lines_gap(left, left[:1], keys=COUNTS, only=True).size == math.inf
    assert lines_gap(left, [left[0], {"step": 2}], keys=COUNTS, only=True).size == math.inf
