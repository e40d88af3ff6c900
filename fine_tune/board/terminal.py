"""A board on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

import rich
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fine_tune.board.columns import Column, columns_of
from fine_tune.board.ranking import Board
from fine_tune.report.visible import brief, visible

# What a narrow terminal does without, the first to go first.
DROPPED = ("trained parameters", "tokens/s", "val loss", "peak memory", "95 % interval", "train time")
# Room around a cell, and for the longest of the texts that may fold.
AROUND, MAX_TEXT = 3, 40


def render(board: Board, width: int | None = None) -> Table:
    """Return the table; names and values appear as text, never as markup.

    Args:
        board: The board.
        width: Characters on a line; columns that have no room are left out. None: those of the console.
    """
    begins = board.begins
    columns = columns_of(board)
    lines = [[column.cell(row).text for column in columns] for row in board.rows]
    heads = short([column.title for column in columns])
    kept = _fitting(columns, [heads, *lines], rich.get_console().width if width is None else width)
    title = f"{board.title}: {len(board.rows)} runs by {board.metric.name}, {board.metric.way}"
    if begins:
        title += f"; names begin with {begins}"
    table = Table(
        title=_text(title), title_justify="left", title_style="bold", caption_justify="left", caption_style=""
    )
    for place in kept:
        table.add_column(_text(heads[place]), justify="right" if columns[place].figure else "left", overflow="fold")
    for row, line in zip(board.rows, lines, strict=True):
        style = "bold" if row.place == 1 else "" if row.finished else "dim"
        table.add_row(*(_text(line[place]) for place in kept), style=style)
    reasons = [f"{row.name.removeprefix(begins)}: {row.ended}: {brief(row.why, 240)}" for row in board.rows if row.why]
    table.caption = _text("\n".join(reasons)) if reasons else None
    return table


def say(board: Board, console: Console) -> None:
    """Print the table, what to know about it, the best run's command, and where the page is."""
    console.print(render(board, console.width))
    for note in board.notes:
        console.print(_text(f"note: {note}"))
    lines = ["the best run again:", board.command] if board.command else []
    for line in (*lines, f"the page: {board.page}"):
        # Never broken: it is to be copied.
        console.print(_text(line), soft_wrap=True)


def short(titles: Sequence[str]) -> list[str]:
    """Write keys by their last word where no other title ends in it.

    Example:
        >>> short(["method.rank", "optim.name", "data.name"])
        ['rank', 'optim.name', 'data.name']
    """
    last = [title.rpartition(".")[2] for title in titles]
    return [end if last.count(end) == 1 else title for title, end in zip(titles, last, strict=True)]


def _fitting(columns: Sequence[Column], lines: Sequence[Sequence[str]], width: int) -> list[int]:
    """Choose the columns that have room; one that is empty has none."""
    kept = [
        place
        for place, column in enumerate(columns)
        if column.title != "peak memory" or any(line[place] not in ("", "-") for line in lines[1:])
    ]
    needs = [AROUND + min(MAX_TEXT, max(len(line[place]) for line in lines)) for place in range(len(columns))]
    for title in DROPPED:
        if 1 + sum(needs[place] for place in kept) <= width:
            break
        kept = [place for place in kept if columns[place].title != title]
    return kept


def _text(text: str) -> Text:
    return Text(visible(text))
