"""Evaluations whose items do not match are not compared, and the message says which item."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fine_tune.errors import DataError
from fine_tune.evaluation.verdict import compare

from .verdict_lines import by_correct, lines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "q9"}, "item 3 (id 'q2') has id 'q2' in the first evaluation and 'q9' in the second"),
        ({"prompt": "Where 2\u202e?"}, "item 3 (id 'q2') has prompt 'Where 2?' in the first evaluation and 'Where 2\\u202e?'"),
        ({"target": "y"}, "item 3 (id 'q2') has target 'x' in the first evaluation and 'y' in the second"),
        ({"correct": None}, "item 'q2' has correct None: must be true, false or a finite number"),
        ({"correct": math.nan}, "item 'q2' has correct nan: must be true, false or a finite number"),
        ({"correct": math.inf}, "item 'q2' has correct inf: must be true, false or a finite number"),
        ({"correct": "yes"}, "item 'q2' has correct 'yes': must be true, false or a finite number"),
        ({"correct": 1}, "correct is true/false in some lines and a number in others"),
    ],
)  # fmt: skip
def test_what_does_not_match_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    a, b = lines([True, False, True, True]), lines([True, False, True, True])
    b[2].update(change)
    b[3].update(change)
    with pytest.raises(DataError) as refused:
        by_correct(a, b)
    assert message in str(refused.value)


def test_a_long_prompt_is_quoted_where_it_differs() -> None:
    a, b = lines([True]), lines([True])
    a[0]["prompt"], b[0]["prompt"] = "x" * 5000 + "this one", "x" * 5000 + "that one"
    with pytest.raises(DataError, match=r"prompt '\.\.\.x{18}this one' .* and '\.\.\.x{18}that one'") as refused:
        by_correct(a, b)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("swapped", [False, True])
def test_another_number_of_items_is_refused(swapped: bool) -> None:
    a, b = lines([True, False, True]), lines([True, False])
    with pytest.raises(DataError, match=r"item 3 \(id 'q2'\) is in one only"):
        by_correct(*((b, a) if swapped else (a, b)))


def test_another_order_a_repeated_id_and_a_group_of_the_answer_are_refused() -> None:
    a = lines([True, False, True])
    with pytest.raises(DataError, match=r"item 1 \(id 'q0'\) has id 'q0' in the first evaluation and 'q2'"):
        by_correct(a, a[::-1])
    with pytest.raises(DataError, match="item 4 has id 'q1': every item needs an id of its own"):
        by_correct([*a, a[1]], [*a, a[1]])
    with pytest.raises(DataError, match="item 'q0' is in group 'True' in the first evaluation and in 'False'"):
        by_correct(a, lines([False, False, True]), group_of=lambda line: str(line["correct"]))
    with pytest.raises(ValueError, match="better='more': must be 'higher' or 'lower'"):
        compare(a, a, field="correct", better="more")
