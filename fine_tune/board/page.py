"""board.html: one file that loads nothing, in the look of the run's report; its only script sorts and filters."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fine_tune.board.columns import Column, columns_of
from fine_tune.board.heat import HeatMap, heat_map
from fine_tune.board.parallel import HIGH, parallel
from fine_tune.board.ranking import Board
from fine_tune.report import visible
from fine_tune.report.visible import plain
from fine_tune.storage import write_text

SHARED = Path(visible.__file__).resolve().parent / "templates"
OWN = Path(__file__).resolve().parent / "templates"
# Cells of the heat map.
CELL_WIDE, CELL_HIGH = 96, 44


def write_page(board: Board) -> None:
    """Write the page.

    Raises:
        StorageError: The file cannot be written.
    """
    write_text(board.page, page(board))


def page(board: Board) -> str:
    """Return the page."""
    style = _text(SHARED / "report.css") + _text(OWN / "board.css")
    script = _text(OWN / "board.js")
    columns = columns_of(board)
    cells = [(row, [column.cell(row) for column in columns]) for row in board.rows]
    kept = [
        place for place, column in enumerate(columns) if _told(column.title, [line[place].missing for _, line in cells])
    ]
    heat = heat_map(board)
    return (
        _environment()
        .get_template("board.html.jinja")
        .render(
            style=Markup(style),  # files of this package, and the only ones that a browser applies or runs:
            script=Markup(script),
            style_hash=_digest(style),  # the policy names them by their hashes
            script_hash=_digest(script),
            board=board,
            facts=_facts(board),
            best=None if board.best is None else plain(board.best.value, board.metric.form),
            settings=_best_settings(board, columns),
            columns=[columns[place] for place in kept],
            cells=[(row, [line[place] for place in kept]) for row, line in cells],
            heat=heat,
            size=_size(heat),
            drawing=parallel(board),
            high=HIGH,
        )
    )


@lru_cache(maxsize=1)
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader([OWN, SHARED]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=visible.clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _told(title: str, missing: list[bool]) -> bool:
    """Whether a column says anything; memory is measured on accelerators only."""
    return title != "peak memory" or not all(missing)


def _best_settings(board: Board, columns: Sequence[Column]) -> list[tuple[str, str]]:
    """Return what the best run has where runs differ."""
    if board.best is None:
        return []
    row = board.best
    return [(column.title, column.cell(row).text) for column in columns if column.title in board.keys]


def _facts(board: Board) -> list[tuple[str, str]]:
    facts = [("runs", f"{len(board.rows)}: {board.counts}"), ("ranked by", f"{board.metric.name}, {board.metric.way}")]
    facts += [("what differs", ", ".join(board.keys))] if board.keys else []
    return [*facts, ("names begin with", board.begins)] if board.begins else facts


def _size(heat: HeatMap | None) -> dict[str, Any]:
    """Return the measures of the heat map's drawing."""
    if heat is None:
        return {}
    left = 16 + 7 * max(len(text) for text in heat.y_labels)
    wide = left + CELL_WIDE * len(heat.x_labels) + 2
    return {"left": left, "cell": CELL_WIDE, "row": CELL_HIGH, "wide": wide, "high": CELL_HIGH * len(heat.rows) + 30}
