"""Runs as lines over their settings and their figure: coordinates for a template."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fine_tune.board.heat import labels, share_of_best, values_in_order
from fine_tune.board.ranking import Board
from fine_tune.board.rows import Row
from fine_tune.board.varying import shown_of, text_of
from fine_tune.report.visible import brief, number, plain

MAX_AXES = 8
# Up to this many values stand at even distances; more are a scale.
MAX_APART = 8
HIGH, TOP, BOTTOM, LEFT, RIGHT, STEP = 290, 44, 18, 70, 86, 190
# A scale over this many times its smallest value is drawn by its logarithm.
LOG_FROM = 30


@dataclass(frozen=True)
class Axis:
    """One axis: its key, its place, and its labelled places."""

    title: str
    x: float
    labels: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Line:
    """One run; ``ink`` is stronger for a better one, None for one without a figure."""

    points: str
    ink: float | None
    best: bool
    says: str


@dataclass(frozen=True)
class Parallel:
    """The figure, ready to draw."""

    axes: tuple[Axis, ...]
    lines: tuple[Line, ...]
    width: float
    left_out: int

    @property
    def says(self) -> str:
        """The figure in words."""
        return f"{len(self.lines)} runs as lines over " + ", ".join(axis.title for axis in self.axes)


def parallel(board: Board) -> Parallel | None:
    """Lay out the runs over their keys and the ranked figure; None without a key or without two ranked runs."""
    keys = board.axes[:MAX_AXES]
    ranked = [row for row in board.rows if row.value is not None]
    if not keys or len(ranked) < 2:
        return None
    places = [_places(board.rows, key) for key in keys]
    figures = _figure_places(board, ranked)
    xs = [LEFT + STEP * index for index in range(len(keys) + 1)]
    axes = [Axis(key, x, _labels(board.rows, key, place)) for key, x, place in zip(keys, xs, places, strict=False)]
    labels = tuple((y, plain(value, board.metric.form)) for value, y in _ends(figures))
    shares = share_of_best(ranked, board.metric)
    # The best is drawn last, above the others.
    drawn = (_line(row, keys, (xs, places), (figures, shares)) for row in reversed(board.rows))
    return Parallel(
        (*axes, Axis(board.metric.name, xs[-1], labels)),
        tuple(line for line in drawn if line is not None),
        xs[-1] + RIGHT,
        len(board.axes) - len(keys),
    )


def _places(rows: Sequence[Row], key: str) -> dict[str, float]:
    """Return the height of each value of a key."""
    texts = values_in_order(rows, key)
    numbers = [number(scalar) for scalar in _of(rows, key, texts)]
    if len(texts) <= MAX_APART or any(value is None for value in numbers):
        return {text: _height(index, 0, len(texts) - 1) for index, text in enumerate(texts)}
    known = [value for value in numbers if value is not None]
    if min(known) > 0 and max(known) / min(known) > LOG_FROM:
        known = [math.log(value) for value in known]
    return {text: _height(value, min(known), max(known)) for text, value in zip(texts, known, strict=True)}


def _of(rows: Sequence[Row], key: str, texts: Sequence[str]) -> list[object]:
    held = {text_of(row.settings, key): row.settings[key] for row in rows if key in row.settings}
    return [held[text] for text in texts]


def _height(value: float, low: float, high: float) -> float:
    """Place a value, the highest on top; a single one stands in the middle."""
    share = (value / 2 - low / 2) / (high / 2 - low / 2) if high > low else 0.5
    return round(HIGH - BOTTOM - share * (HIGH - BOTTOM - TOP), 1)


def _labels(rows: Sequence[Row], key: str, places: Mapping[str, float]) -> tuple[tuple[float, str], ...]:
    """Label every value where there are few, else the ends and the middle."""
    shown = list(places)
    if len(shown) > MAX_APART:
        shown = [shown[0], shown[len(shown) // 2], shown[-1]]
    return tuple((places[text], label) for text, label in zip(shown, labels(rows, key, shown), strict=True))


def _figure_places(board: Board, ranked: Sequence[Row]) -> dict[float, float]:
    """Return the height of each figure: better is higher."""
    worths = {row.value: -board.metric.worth(row.value) for row in ranked if row.value is not None}
    low, high = min(worths.values()), max(worths.values())
    return {value: _height(worth, low, high) for value, worth in worths.items()}


def _ends(figures: Mapping[float, float]) -> list[tuple[float, float]]:
    """Return the best and the worst figure with their heights."""
    ordered = sorted(figures.items(), key=lambda entry: entry[1])
    return [ordered[0], ordered[-1]] if len(ordered) > 1 else ordered


def _line(
    row: Row,
    keys: Sequence[str],
    grid: tuple[Sequence[float], Sequence[Mapping[str, float]]],
    scale: tuple[Mapping[float, float], Mapping[float, float]],
) -> Line | None:
    xs, places = grid
    figures, shares = scale
    held = [
        (x, place[text_of(row.settings, key)])
        for key, x, place in zip(keys, xs, places, strict=False)
        if key in row.settings
    ]
    if row.value is not None:
        held.append((xs[-1], figures[row.value]))
    if len(held) < 2:
        return None
    told = ", ".join(f"{key}={shown_of(row.settings, key)}" for key in keys if key in row.settings)
    ink = None if row.value is None else round(0.3 + 0.6 * shares[row.value], 2)
    figure = row.ended if row.value is None else plain(row.value)
    return Line(
        " ".join(f"{x},{y}" for x, y in held), ink, row.place == 1, brief(f"{row.name}: {figure} ({told})", 300)
    )
