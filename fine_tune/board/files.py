"""board.csv for spreadsheets, and board.json with everything, results apart from what a machine's day decides."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from typing import Any

from fine_tune.board.ranking import Board
from fine_tune.board.rows import Row
from fine_tune.board.varying import text_of
from fine_tune.report.visible import number, visible
from fine_tune.storage import write_json, write_text
from fine_tune.summary import FURTHER, KEYS

NAMES = ("run_name", "device", "precision", "loss_unit", "objective", "method", "model")
# The same words on the same machine give the same figures, but for these.
CHANGING = re.compile(r"_seconds$|_per_second$|_gb$|^mfu$")
FIGURES = tuple(key for key in (*KEYS, *FURTHER) if key not in NAMES)
TIMINGS = tuple(key for key in FIGURES if CHANGING.search(key))
METRICS = tuple(key for key in FIGURES if key not in TIMINGS)
# A spreadsheet takes a text that begins so for a formula.
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def as_dict(board: Board) -> dict[str, Any]:
    """Return the board as plain values for JSON."""
    best = board.best
    return {
        "title": board.title,
        "metric": board.metric.name,
        "direction": "minimize" if board.metric.lower_is_better else "maximize",
        "keys": list(board.keys),
        "best": None if best is None else {"run": best.name, "value": best.value, "command": board.command or None},
        "runs": [_run(row) for row in board.rows],
        "notes": list(board.notes),
    }


def write_json_file(board: Board) -> None:
    """Write board.json."""
    write_json(board.out / "board.json", as_dict(board))


def write_csv(board: Board) -> None:
    """Write board.csv: one line for each run, empty where nothing is known."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    heads = ("place", "run", "status", *board.keys, "interval_low", "interval_high", *_figures(board))
    writer.writerow([_inert(head) for head in (*heads, "exit_code", "error", "reason")])
    for row in board.rows:
        low, high = row.interval or (None, None)
        figures = [finite(_summary(row, board).get(key)) for key in _figures(board)]
        values = (
            row.place,
            row.name,
            row.status,
            *(text_of(row.settings, key) for key in board.keys),
            low,
            high,
            *figures,
        )
        writer.writerow([_inert(value) for value in (*values, row.exit_code, row.error, row.reason)])
    write_text(board.out / "board.csv", stream.getvalue())


def _figures(board: Board) -> tuple[str, ...]:
    """Name the ranked figure and then the others."""
    return tuple(dict.fromkeys((board.metric.name, *METRICS, *TIMINGS)))


def _summary(row: Row, board: Board) -> Mapping[str, Any]:
    return {**row.summary, board.metric.name: row.value}


def _inert(value: Any) -> Any:
    """Write a cell so that no terminal and no spreadsheet takes it for an order."""
    if value is None or isinstance(value, int | float):
        return "" if value is None else value
    text = " ".join(visible(str(value)).split())
    if text.startswith(FORMULA) and not _is_number(text):
        return f"'{text}"
    return text


def finite(value: Any) -> int | float | None:
    """Return a finite number as it is, None for everything else."""
    return value if number(value) is not None else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _run(row: Row) -> dict[str, Any]:
    said = row.summary
    return {
        "place": row.place,
        "run": row.name,
        "job": row.job,
        "status": row.status,
        "value": row.value,
        "interval": None if row.interval is None else list(row.interval),
        "settings": row.settings,
        "metrics": {key: finite(said.get(key)) for key in METRICS},
        "timings": {**{key: finite(said.get(key)) for key in TIMINGS}, "job_seconds": finite(row.job_seconds)},
        **{key: said[key] if isinstance(said.get(key), str) else None for key in NAMES[1:]},
        "exit_code": row.exit_code,
        "error": row.error or None,
        "reason": row.reason or None,
    }
