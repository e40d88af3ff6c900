"""What must agree between two checkpoints before anything is scored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from fine_tune.errors import DataError
from fine_tune.evaluation.same_items import check_same_items, what_is_asked


@dataclass(frozen=True)
class Row:
    id: str
    prompt: str
    tokens: Any = 7
    other: str = "not compared"


ROWS = [Row(f"r{i}", f"question {i}") for i in range(3)]


def told(**change: Any) -> str:
    changed = [ROWS[0], replace(ROWS[1], **change), ROWS[2]]
    with pytest.raises(DataError) as refused:
        check_same_items(what_is_asked(ROWS), what_is_asked(changed), names=("sft", "dpo"))
    return str(refused.value)


def test_items_that_agree_pass_whatever_else_they_hold() -> None:
    assert what_is_asked(ROWS[:1]) == [{"id": "r0", "tokens": 7, "prompt": "question 0"}]
    check_same_items(what_is_asked(ROWS), what_is_asked([replace(row, other="x") for row in ROWS]))


def test_the_first_difference_is_named_with_both_checkpoints() -> None:
    assert told(id="x").startswith("item 2 (id 'r1') has id 'r1' in sft and 'x' in dpo: only identical items")
    assert told(prompt="question 1?").startswith(
        "item 2 (id 'r1') has prompt 'question 1' in sft and 'question 1?' in dpo"
    )


def test_unlike_tokens_say_what_differs_and_what_to_do() -> None:
    assert told(tokens=9, prompt="question one").startswith(
        "item 2 (id 'r1') has 7 learned tokens in sft and 9 in dpo: their tokenizers or chat templates differ"
    )


def test_the_lengths_of_a_pair_may_differ() -> None:
    one, other = ([{"id": "p", "prompt": "q", "tokens": {"chosen": n, "rejected": 2}}] for n in (3, 4))
    check_same_items(one, other)


def test_one_item_more_is_named() -> None:
    with pytest.raises(DataError, match=r"sft has 3 items and dpo 2; item 3 \(id 'r2'\) is in one only"):
        check_same_items(what_is_asked(ROWS), what_is_asked(ROWS[:2]), names=("sft", "dpo"))
