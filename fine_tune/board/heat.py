"""A figure over two keys: what a template needs to draw the map, and nothing of its looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fine_tune.board.metric import Metric
from fine_tune.board.ranking import Board
from fine_tune.board.rows import Row
from fine_tune.board.varying import shown_of, text_of
from fine_tune.report.visible import number, plain

USUAL = ("method.rank", "method.alpha")
MAX_VALUES = 12
# Characters of a label.
MAX_LABEL = 16
# A search that never takes a value twice would draw a diagonal in an empty map.
MAX_CELLS_PER_RUN = 4
# Ink of the worst and of the best figure; the text stays readable on either.
FAINT, STRONG = 0.06, 0.55


@dataclass(frozen=True)
class HeatCell:
    """One cell: the figure of its best run and how strong its colour is, or why there is none."""

    text: str
    ink: float | None
    best: bool
    says: str


@dataclass(frozen=True)
class HeatMap:
    """Labels of the values of two keys, and a cell for each pair of them; the first row is on top."""

    x_key: str
    y_key: str
    x_labels: tuple[str, ...]
    y_labels: tuple[str, ...]
    rows: tuple[tuple[HeatCell, ...], ...]
    several: bool

    @property
    def says(self) -> str:
        """The map in words."""
        told = (cell.says for row in self.rows for cell in row)
        return f"{self.y_key} by {self.x_key}: " + "; ".join(told)


def heat_map(board: Board) -> HeatMap | None:
    """Lay out a board over two of its keys; None where no two of them span a map."""
    keys = _keys(board.axes)
    if keys is None:
        return None
    x_key, y_key = keys
    rows = [row for row in board.rows if x_key in row.settings and y_key in row.settings]
    x_values, y_values = values_in_order(rows, x_key), values_in_order(rows, y_key)
    if not 2 <= min(len(x_values), len(y_values)) <= max(len(x_values), len(y_values)) <= MAX_VALUES:
        return None
    if len(x_values) * len(y_values) > MAX_CELLS_PER_RUN * len(rows):
        return None
    inside: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        inside.setdefault((text_of(row.settings, x_key), text_of(row.settings, y_key)), []).append(row)
    shares = share_of_best(rows, board.metric)
    cells = tuple(
        tuple(_cell(inside.get((x, y), []), f"{y_key}={y}, {x_key}={x}", board.metric, shares) for x in x_values)
        for y in reversed(y_values)
    )
    several = any(len(found) > 1 for found in inside.values())
    x_labels, y_labels = (labels(rows, key, values) for key, values in ((x_key, x_values), (y_key, y_values[::-1])))
    return HeatMap(x_key, y_key, x_labels, y_labels, cells, several)


def values_in_order(rows: Sequence[Row], key: str) -> tuple[str, ...]:
    """Return the values that a key takes: numbers by size, then words by letter."""
    found = {text_of(row.settings, key): number(row.settings[key]) for row in rows if key in row.settings}
    return tuple(sorted(found, key=lambda text: (found[text] is None, found[text] or 0.0, text)))


def labels(rows: Sequence[Row], key: str, texts: Sequence[str]) -> tuple[str, ...]:
    """Return values of a key as they have room beside an axis."""
    held = {text_of(row.settings, key): shown_of(row.settings, key) for row in rows}
    return tuple(held[text] if len(held[text]) <= MAX_LABEL else f"{held[text][: MAX_LABEL - 2]}.." for text in texts)


def share_of_best(rows: Sequence[Row], metric: Metric) -> dict[float, float]:
    """Return for each figure where it lies between the worst, 0, and the best, 1."""
    worths = {row.value: metric.worth(row.value) for row in rows if row.value is not None}
    if not worths:
        return {}
    low, high = min(worths.values()), max(worths.values())
    # Halved before they are subtracted: the distance of two floats may be no float.
    span = high / 2 - low / 2
    return {value: (high / 2 - worth / 2) / span if span > 0 else 1.0 for value, worth in worths.items()}


def _keys(axes: Sequence[str]) -> tuple[str, str] | None:
    """Choose two keys: those that vary, those of rank and alpha, else the first two of the sweep."""
    if len(axes) < 2:
        return None
    if len(axes) > 2 and all(key in axes for key in USUAL):
        return USUAL
    return axes[0], axes[1]


def _cell(found: Sequence[Row], place: str, metric: Metric, shares: Mapping[float, float]) -> HeatCell:
    ranked = [row for row in found if row.value is not None]
    if not ranked:
        state = found[0].status if found else ""
        text = "no figure" if state == "finished" else state
        return HeatCell(text, None, False, f"{place}: {text or 'not run'}")
    best = min(ranked, key=lambda row: (metric.worth(row.value or 0.0), row.name))
    text, value = plain(best.value, metric.form), best.value or 0.0
    more = f" (best of {len(ranked)})" if len(ranked) > 1 else ""
    ink = round(FAINT + (STRONG - FAINT) * shares[value], 3)
    return HeatCell(text, ink, best.place == 1, f"{place}: {text}{more}, {best.name}")
