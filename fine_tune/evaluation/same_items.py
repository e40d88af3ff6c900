"""Two evaluations can be compared item by item only if their items and the kind of their values agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fine_tune.errors import DataError

Line = Mapping[str, Any]
NAMES = ("the first evaluation", "the second")
# A plain number of tokens is that of perplexity, by which scores are divided; a pair's counts decide nothing.
ASKED = ("id", "tokens", "prompt", "target")


def what_is_asked(items: Sequence[Any]) -> list[dict[str, Any]]:
    """Return what of each item must agree between two checkpoints; all of it is known before anything is scored."""
    return [{key: getattr(item, key) for key in ASKED if hasattr(item, key)} for item in items]


def check_same_items(lines_a: Sequence[Line], lines_b: Sequence[Line], *, names: tuple[str, str] = NAMES) -> None:
    """Refuse two evaluations whose ids, prompts, targets or token counts differ anywhere, naming the first difference.

    Args:
        lines_a: Lines of the first evaluation, or what is asked in it.
        lines_b: Likewise of the second.
        names: What the message calls the two.

    Raises:
        DataError: An item differs, is in one evaluation only, or shares its id with another.
    """
    seen: set[str] = set()
    for number, (a, b) in enumerate(zip(lines_a, lines_b, strict=False), start=1):
        for key in ASKED:
            if a.get(key) != b.get(key) and not isinstance(a.get(key), Mapping):
                raise DataError(_difference(number, key, a, b, names))
        if "id" not in a or str(a["id"]) in seen:
            raise DataError(
                f"item {number} has id {a.get('id')!a}: every item needs an id of its own. Fix the item list."
            )
        seen.add(str(a["id"]))
    if len(lines_a) != len(lines_b):
        extra = (lines_a if len(lines_a) > len(lines_b) else lines_b)[len(seen)]
        raise DataError(
            f"{names[0]} has {len(lines_a)} items and {names[1]} {len(lines_b)}; item {len(seen) + 1} "
            f"(id {extra.get('id')!a}) is in one only. Finish both evaluations on the same items."
        )


def _difference(number: int, key: str, a: Line, b: Line, names: tuple[str, str]) -> str:
    item = f"item {number} (id {a.get('id')!a})"
    if key == "tokens":
        return (
            f"{item} has {a.get(key)} learned tokens in {names[0]} and {b.get(key)} in {names[1]}: their tokenizers or chat "
            "templates differ, and nats per token of unlike tokens cannot be compared. Evaluate them one by one."
        )
    one, two = _around_difference(str(a.get(key)), str(b.get(key)))
    return (
        f"{item} has {key} {one} in {names[0]} and {two} in {names[1]}: only identical items are compared. "
        "Evaluate both models anew on the same items."
    )


def _around_difference(one: str, two: str) -> tuple[str, str]:
    """Quote both texts from shortly before the first character in which they differ."""
    same = next((i for i, (x, y) in enumerate(zip(one, two, strict=False)) if x != y), min(len(one), len(two)))
    start = max(0, same - 20)
    lead = "..." if start else ""
    return ascii(lead + one[start : start + 60]), ascii(lead + two[start : start + 60])


def is_binary(lines_a: Sequence[Line], lines_b: Sequence[Line], field: str) -> bool:
    """Tell true/false from numbers; refuse everything else, and a mixture of both.

    Raises:
        DataError: A value is missing, neither true/false nor a number, or not finite; or both kinds occur.
    """
    kinds = set()
    for line in (*lines_a, *lines_b):
        value = line.get(field)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise DataError(
                f"item {line['id']!a} has {field} {value!r}: must be true, false or a finite number. "
                "Evaluate the item anew; a mean over it would say nothing."
            )
        kinds.add(isinstance(value, bool))
    if len(kinds) > 1:
        raise DataError(
            f"{field} is true/false in some lines and a number in others: must be one kind in both evaluations."
        )
    return kinds != {False}
