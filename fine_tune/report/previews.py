"""What base and runs said to the preview prompts, now and over the steps of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fine_tune.report.reading import RunFiles
from fine_tune.report.visible import brief, number, plain

MAX_PROMPTS = 12
MAX_STEPS = 40
MAX_ANSWER = 1500


@dataclass(frozen=True)
class Said:
    """What the model of one run said to a prompt at each previewed step, the last one last."""

    label: str
    steps: tuple[tuple[str, str], ...]
    left_out: int

    @property
    def now(self) -> tuple[str, str]:
        """The last step and its answer."""
        return self.steps[-1]


@dataclass
class Preview:
    """One prompt: what the base says, and what each run made of it."""

    prompt: str
    base: str
    runs: list[Said] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        """How many answers there are over time."""
        return max(len(said.steps) for said in self.runs)

    @property
    def left_out(self) -> int:
        """Answers that are in the files only."""
        return sum(said.left_out for said in self.runs)


def previews(runs: Sequence[RunFiles]) -> list[Preview]:
    """Group the lines of previews.jsonl by prompt, in the order they first appear; a run follows the one it started from."""
    found: dict[str, Preview] = {}
    for run in runs:
        for prompt, lines in _by_prompt(run).items():
            base = said_text(lines[-1].get("base_completion"))
            found.setdefault(prompt, Preview(brief(prompt, MAX_ANSWER), base)).runs.append(_said(run_label(run), lines))
    # What most runs were asked first: there they stand side by side.
    return sorted(found.values(), key=lambda preview: -len(preview.runs))[:MAX_PROMPTS]


def _by_prompt(run: RunFiles) -> dict[str, list[Mapping[str, Any]]]:
    """Return the usable lines of a run's previews.jsonl by prompt, by rising step."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for line in run.previews:
        if number(line.get("step")) is not None and isinstance(line.get("prompt"), str):
            found.setdefault(line["prompt"], []).append(line)
    return {prompt: sorted(lines, key=lambda line: number(line["step"]) or 0.0) for prompt, lines in found.items()}


def _said(label: str, lines: Sequence[Mapping[str, Any]]) -> Said:
    stride = -(-len(lines) // MAX_STEPS)
    # Counted from the end, so that the last step is always shown.
    kept = lines[::-1][::stride][::-1]
    steps = tuple((plain(line["step"]), said_text(line.get("completion"))) for line in kept)
    return Said(label, steps, len(lines) - len(kept))


def said_text(value: Any) -> str:
    """Write what a model said, which should be a text."""
    return brief(value, MAX_ANSWER) if isinstance(value, str) else plain(value)


def run_label(run: RunFiles) -> str:
    """Name a run where several stand beside each other."""
    return f"{run.objective} ({run.name})" if run.objective else run.name
