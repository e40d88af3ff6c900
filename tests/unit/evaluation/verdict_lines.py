"""Lines of two evaluations, made to be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fine_tune.evaluation.verdict import Verdict, compare

Lines = list[dict[str, Any]]


def lines(values: Sequence[object], field: str = "correct", *, groups: int = 1) -> Lines:
    return [
        {"id": f"q{i}", "prompt": f"Where {i}?", "target": "x", "subject": f"s{i % groups}", field: value}
        for i, value in enumerate(values)
    ]


def by_correct(a: Lines, b: Lines, **more: Any) -> Verdict:
    return compare(a, b, field="correct", better="higher", **more)
