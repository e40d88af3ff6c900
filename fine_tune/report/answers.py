"""Answers of base and several runs to the same prompts, beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fine_tune.report.evaluated import Asked
from fine_tune.report.previews import run_label, said_text
from fine_tune.report.reading import EvaluationFiles, RunFiles, read_items
from fine_tune.report.tables import words
from fine_tune.report.visible import brief

MAX_PROMPTS = 24
MAX_PROMPT = 1500


@dataclass(frozen=True)
class Answer:
    """What a checkpoint said to a prompt; ``right`` is None where nothing judged it."""

    text: str
    right: bool | None = None
    target: str = ""


@dataclass(frozen=True)
class SideBySide:
    """Prompts that every column answered; ``shared`` counts those beyond what is shown, too."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, str, tuple[Answer, ...]], ...]
    shared: int


def side_by_side(runs: Sequence[RunFiles]) -> list[SideBySide]:
    """Put base and runs beside each other, for held-out questions that all of them answered; none if fewer than two did.

    What a run's starting point said counts as an answer of the run it started from, if that one is among ``runs``.
    """
    answered: list[tuple[str, dict[str, Answer]]] = [
        (run_label(run), dict(_of_evaluation(run, "held_out"))) for run in runs
    ]
    for run in runs:
        for position, other in enumerate(runs):
            if run.starts_from == other.path:
                answered[position][1].update(_of_evaluation(run, "held_out_initial"))
    base: dict[str, Answer] = {}
    for run in runs:
        base |= dict(_of_evaluation(run, "held_out_base"))
    return _beside("Side by side", [("Base", base), *answered])


def checkpoints_beside(one: Asked) -> list[SideBySide]:
    """Put checkpoints beside each other that one evaluation let answer."""
    said = [(label, dict(_of_items(one.run, found))) for label, found in one.found.items()]
    return [] if one.name == "held_out" else _beside(f"Side by side: {words(one.name)}", said)


def _beside(title: str, answered: Sequence[tuple[str, dict[str, Answer]]]) -> list[SideBySide]:
    columns = [(label, said) for label, said in answered if said]
    if len(columns) < 2:
        return []
    # In the order of the last one: its questions are what the comparison is about.
    prompts = [prompt for prompt in columns[-1][1] if all(prompt in said for _, said in columns)]
    rows = tuple(_row(prompt, [said[prompt] for _, said in columns]) for prompt in _spread(prompts, MAX_PROMPTS))
    return [SideBySide(title, tuple(label for label, _ in columns), rows, len(prompts))]


def in_order(runs: Sequence[RunFiles]) -> list[RunFiles]:
    """Put a run after the one it started from, and keep the given order otherwise."""
    by_path = {run.path: run for run in runs}

    def depth(run: RunFiles) -> int:
        steps, seen, at = 0, {run.path}, run
        while at.starts_from in by_path and at.starts_from not in seen:
            at = by_path[at.starts_from]
            seen.add(at.path)
            steps += 1
        return steps

    return sorted(by_path.values(), key=depth)


def _row(prompt: str, said: Sequence[Answer]) -> tuple[str, str, tuple[Answer, ...]]:
    target = next((answer.target for answer in said if answer.target), "")
    return brief(prompt, MAX_PROMPT), target, tuple(said)


def _spread(prompts: Sequence[str], most: int) -> list[str]:
    """Take prompts evenly from a list that may be sorted by task."""
    count = min(len(prompts), most)
    return [prompts[index * len(prompts) // count] for index in range(count)]


def _of_evaluation(run: RunFiles, name: str) -> Iterator[tuple[str, Answer]]:
    for evaluation in run.evaluations:
        if evaluation.name == name:
            yield from _of_items(run, evaluation)


def _of_items(run: RunFiles, evaluation: EvaluationFiles) -> Iterator[tuple[str, Answer]]:
    for item in read_items(run, evaluation):
        if isinstance(item.get("prompt"), str) and isinstance(item.get("completion"), str):
            yield item["prompt"], _answer(item)


def _answer(item: Mapping[str, Any]) -> Answer:
    right, target = item.get("correct"), item.get("target")
    return Answer(
        said_text(item["completion"]),
        right if isinstance(right, bool) else None,
        brief(target, 300) if isinstance(target, str) else "",
    )
