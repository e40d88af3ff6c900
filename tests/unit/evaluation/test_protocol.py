from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from fine_tune.evaluation.protocol import score_each

ITEMS = ["a", "b", "c"]


def test_a_chunk_is_scored_when_its_lines_are_asked_for() -> None:
    done: list[list[int]] = []

    def score(_subject: Any, items: list[str], chunk: list[int]) -> list[dict[str, Any]]:
        done.append(chunk)
        return [{"id": items[i]} for i in chunk]

    evaluation: Any = SimpleNamespace(score=score)
    found = score_each(evaluation, None, ITEMS, [[2, 0], [1]])  # type: ignore[arg-type]
    assert next(found) == [{"id": "c"}, {"id": "a"}]
    assert done == [[2, 0]]
    assert list(found) == [[{"id": "b"}]]


def test_an_evaluation_may_go_through_the_chunks_itself_and_is_told_when_to_stop() -> None:
    done: list[str] = []

    def own(_subject: Any, items: list[str], chunks: list[list[int]]) -> Iterator[list[dict[str, Any]]]:
        try:
            done.extend(items[i] for chunk in chunks for i in chunk)
            yield from ([{"id": items[i]} for i in chunk] for chunk in chunks)
        finally:
            done.append("closed")

    evaluation: Any = SimpleNamespace(score_each=own)
    found = score_each(evaluation, None, ITEMS, [[2], [1]])  # type: ignore[arg-type]
    assert next(found) == [{"id": "c"}]
    assert done == ["c", "b"]
    found.close()
    assert done == ["c", "b", "closed"]
