"""The verdict that every finished run can have without a further command: its own held-out answers against those before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fine_tune.errors import DataError
from fine_tune.evaluation.verdict import compare
from fine_tune.report.evaluated import HELD_OUT
from fine_tune.report.flips import flips_table
from fine_tune.report.reading import RunFiles, read_items
from fine_tune.report.tables import Verdict, verdict

AFTER = "held_out"
SOURCE = "held-out questions of the run"


def held_out_verdicts(run: RunFiles) -> Iterator[Verdict]:
    """Compare a run's last answers with those of its base, and with those before its first step where it began with an adapter."""
    answers = {name: _items(run, name) for name in HELD_OUT}
    for name, said in HELD_OUT.items():
        if name == AFTER or not answers[name] or not answers[AFTER]:
            continue
        start = said if name == "held_out_base" else f"{run.label} {said}"
        try:
            found = compare(answers[name], answers[AFTER], field="correct", better="higher").named(start, run.label)
        except DataError:
            continue  # not the same items: nothing can be said
        changed = [("lost", item) for item in found.lost] + [("gained", item) for item in found.gained]
        sides = {start: _by_id(answers[name]), run.label: _by_id(answers[AFTER])}
        yield verdict(SOURCE, found.as_dict(), flips_table(changed, sides))


def _items(run: RunFiles, name: str) -> list[dict[str, Any]]:
    for evaluation in run.evaluations:
        if evaluation.name == name:
            items = list(read_items(run, evaluation))
            judged = all(isinstance(item.get("id"), str) and isinstance(item.get("correct"), bool) for item in items)
            return items if judged else []
    return []


def _by_id(items: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {item["id"]: item for item in items}
