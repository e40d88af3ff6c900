"""Exact match on held-out questions, by generation, written one line per question."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fine_tune.data.prepare import EvalItem
from fine_tune.evaluation.answers import Answerer, Completion
from fine_tune.evaluation.scores import share
from fine_tune.storage import write_json, write_text
from fine_tune.text.answers import is_correct


@dataclass(frozen=True)
class HeldOut:
    """A held-out generation: share of right answers (None without a rule) and mean completion length in tokens."""

    exact_match: float | None
    mean_completion_tokens: float
    completions: tuple[Completion, ...]


def evaluate_held_out(
    answerer: Answerer,
    items: Sequence[EvalItem],
    *,
    rule: str | None,
    max_new_tokens: int,
    base: bool = False,
    progress: Callable[[int], None] | None = None,
) -> HeldOut:
    """Generate an answer to every item and judge it by ``rule``."""
    said = answerer.answer(
        [item.messages for item in items], max_new_tokens=max_new_tokens, base=base, progress=progress
    )
    right = None
    if rule is not None:
        right = sum(is_correct(c.text, item.answer, rule) for c, item in zip(said, items, strict=True)) / len(items)
    return HeldOut(right, sum(c.num_tokens for c in said) / len(said), tuple(said))


def write_held_out(
    folder: Path, result: HeldOut, items: Sequence[EvalItem], *, rule: str | None, checkpoint: str, started: float
) -> None:
    """Write ``metrics.json`` and ``items.jsonl`` of one held-out generation into an eval folder."""
    lines = []
    for completion, item in zip(result.completions, items, strict=True):
        line = {
            "id": item.id,
            "prompt": item.messages[-1].content,
            "completion": completion.text,
            "target": item.answer,
            "correct": None if rule is None else is_correct(completion.text, item.answer, rule),
            "num_tokens": completion.num_tokens,
            "stopped": completion.stopped,
        }
        lines.append(json.dumps(line, ensure_ascii=True))
    write_text(folder / "items.jsonl", "\n".join(lines) + "\n")
    metrics = {
        "exact_match": result.exact_match,
        "mean_completion_tokens": result.mean_completion_tokens,
        "stop_rate": share([completion.stopped for completion in result.completions]),
    }
    write_json(
        folder / "metrics.json",
        {
            "name": folder.name,
            "checkpoint": checkpoint,
            "num_items": len(items),
            "metrics": metrics,
            "answer_rule": rule,
            "seconds": time.perf_counter() - started,
        },
    )


def read_held_out(folder: Path) -> HeldOut:
    """Read back what :func:`write_held_out` wrote."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["metrics"]
    lines = [json.loads(line) for line in (folder / "items.jsonl").read_text(encoding="utf-8").splitlines()]
    said = tuple(Completion(line["completion"], line["num_tokens"], line.get("stopped")) for line in lines)
    return HeldOut(metrics["exact_match"], metrics["mean_completion_tokens"], said)
