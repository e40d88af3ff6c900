"""The columns of a board, one list for the terminal, the page and the CSV's order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fine_tune.board.ranking import Board
from fine_tune.board.rows import Row
from fine_tune.board.varying import shown_of
from fine_tune.report.visible import NOTHING, number, plain

# Beside the ranked figure: label, key of the summary, format.
FIGURES = (
    ("val loss", "final_loss", "{:.4f}"),
    ("trained parameters", "trainable_parameters", "{:,}"),
    ("peak memory", "peak_memory_gb", "{:.2f} GB"),
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
)


@dataclass(frozen=True)
class Shown:
    """One cell: its text, and the number that it is sorted by, if it is one."""

    text: str
    number: float | None = None

    @property
    def missing(self) -> bool:
        """Whether there is nothing in it."""
        return self.text in ("", NOTHING)


@dataclass(frozen=True)
class Column:
    """One column; figures stand to the right."""

    title: str
    figure: bool
    cell: Callable[[Row], Shown]


def columns_of(board: Board) -> list[Column]:
    """Return the columns from the place to the status."""
    return [
        Column("#", True, lambda row: _figure(row.place)),
        Column("run", False, lambda row: Shown(row.name.removeprefix(board.begins) or row.name)),
        *(_setting(board, key) for key in board.keys),
        Column(board.metric.name, True, lambda row: _figure(row.value, board.metric.form)),
        Column("95 % interval", True, _interval),
        *(_of_summary(*figure) for figure in FIGURES if figure[1] != board.metric.name),
        Column("train time", True, _time),
        Column("status", False, lambda row: Shown(row.ended)),
    ]


def _setting(board: Board, key: str) -> Column:
    known = [row.settings[key] for row in board.rows if key in row.settings]
    figure = bool(known) and all(number(value) is not None for value in known)
    return Column(key, figure, lambda row: Shown(shown_of(row.settings, key) or NOTHING, number(row.settings.get(key))))


def _of_summary(title: str, key: str, form: str) -> Column:
    return Column(title, True, lambda row: _figure(row.summary.get(key), form))


def _figure(value: object, form: str = "") -> Shown:
    found = number(value)
    return Shown(plain(value, form if found is not None else ""), found) if value is not None else Shown(NOTHING)


def _interval(row: Row) -> Shown:
    if row.interval is None:
        return Shown(NOTHING)
    low, high = row.interval
    return Shown(f"{low:.3f} to {high:.3f}", low)


def _time(row: Row) -> Shown:
    seconds = number(row.summary.get("train_seconds"))
    return Shown(NOTHING) if seconds is None else Shown(duration(seconds), seconds)


def duration(seconds: float) -> str:
    """Write a time in the unit that suits it.

    Example:
        >>> [duration(s) for s in (17.04, 150, 10000)]
        ['17.0 s', '2.5 min', '2.8 h']
    """
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
