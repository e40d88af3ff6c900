"""Runs ranked by one figure, with what differs between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fine_tune.board.command import command_of
from fine_tune.board.finding import Found
from fine_tune.board.metric import Metric, choose, interval_of
from fine_tune.board.rows import Row
from fine_tune.board.varying import MAX_KEYS, number_of_values, settings, shared_beginning, varying

ORDER = ("finished", "running", "pruned", "interrupted", "failed", "gone")


@dataclass(frozen=True)
class Board:
    """Runs in order: ranked ones, finished ones without the figure, and those that did not finish.

    Attributes:
        title: What the runs are called together.
        metric: What they are ranked by.
        keys: What differs between them, those of the sweep first.
        axes: The keys that figures are drawn over.
        rows: The runs.
        command: The words that repeat the best run; empty where they are not known.
        notes: What a reader should know, a sentence each.
        out: The folder of its files.
    """

    title: str
    metric: Metric
    keys: tuple[str, ...]
    axes: tuple[str, ...]
    rows: tuple[Row, ...]
    command: str
    notes: tuple[str, ...]
    out: Path

    @property
    def best(self) -> Row | None:
        """The first of the ranked runs."""
        return self.rows[0] if self.rows and self.rows[0].place == 1 else None

    @property
    def counts(self) -> str:
        """How many runs ended in which way, in words."""
        found = Counter(row.status for row in self.rows)
        return ", ".join(f"{found[status]} {status}" for status in ORDER if found[status])

    @property
    def begins(self) -> str:
        """What the names of all runs begin with, if that is long."""
        return shared_beginning([row.name for row in self.rows if row.path is not None])

    @property
    def page(self) -> Path:
        """The file of its page."""
        return self.out / "board.html"


def rank(found: Found, *, out: Path, metric: str | None = None) -> Board:
    """Rank what was found.

    Raises:
        ConfigError: No finished run has the metric.
    """
    chosen = choose(found.rows, found.sweep, metric)
    keys = varying(found.rows, found.swept)
    rows = [replace(row, settings=settings(row, keys)) for row in found.rows]
    for row in rows:
        row.value = chosen.of(row) if row.finished else None
        row.interval = interval_of(row, chosen)
    ordered = _ordered(rows, chosen)
    command, note = "", ""
    if ordered and ordered[0].place == 1:
        command, note = command_of(ordered[0], found.sweep.get("command"))
    differ = [key for key in keys if number_of_values(rows, key) > 1]
    axes = [key for key in found.swept if key in differ] or differ
    notes = [*([note] if note else []), *_notes(ordered, chosen, keys), *found.notes]
    return Board(found.title, chosen, keys[:MAX_KEYS], tuple(axes), tuple(ordered), command, tuple(notes), out)


def _ordered(rows: Sequence[Row], metric: Metric) -> list[Row]:
    """Put the best first; equal figures share a place and stand by name."""
    ranked = sorted(
        ((metric.worth(row.value), row.name, row) for row in rows if row.value is not None), key=lambda entry: entry[:2]
    )
    for position, (worth, _, row) in enumerate(ranked):
        equal = position > 0 and worth == ranked[position - 1][0]
        row.place = ranked[position - 1][2].place if equal else position + 1
    others = sorted(
        (row for row in rows if row.value is None), key=lambda row: (ORDER.index(row.status), row.job or 0, row.name)
    )
    return [row for _, _, row in ranked] + others


def _notes(rows: Sequence[Row], metric: Metric, keys: Sequence[str]) -> Iterator[str]:
    first = [row.name for row in rows if row.place == 1]
    if len(first) > 1:
        yield f"{len(first)} runs share the first place: {', '.join(first[:6])}{', ...' if len(first) > 6 else ''}."
    units = sorted({str(row.summary.get("loss_unit")) for row in rows if row.value is not None})
    if "loss" in metric.name and len(units) > 1:
        yield f"The losses are in different units ({', '.join(units)}): they do not compare."
    data = {str(row.manifest.get("data_fingerprint")) for row in rows if row.value is not None}
    if len(data - {"None"}) > 1:
        yield "The runs did not all train on the same rows; figures on different held-out rows do not compare."
    if any(row.interval for row in rows):
        yield (
            "Intervals are of each run alone. Runs that answered the same questions compare more sharply: "
            "python evaluate.py ckpt=[<run>,<run>] eval=exact_match."
        )
    if unranked := [row.name for row in rows if row.finished and row.value is None]:
        yield f"No place without a finite {metric.name}: {', '.join(unranked[:6])}{', ...' if len(unranked) > 6 else ''}."
    if len(keys) > MAX_KEYS:
        yield f"{len(keys) - MAX_KEYS} more keys differ; board.json has them all."
