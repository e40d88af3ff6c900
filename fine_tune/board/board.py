"""Runs ranked and written: as a page, as a table for spreadsheets, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fine_tune.board.files import write_csv, write_json_file
from fine_tune.board.finding import find
from fine_tune.board.page import write_page
from fine_tune.board.ranking import Board, rank


def make_board(source: Path | Sequence[Path], *, out: Path, metric: str | None = None) -> Board:
    """Rank runs and write board.csv, board.json and board.html.

    Args:
        source: A folder of runs, the folder of a sweep, a run, or several of these.
        out: The folder to write to.
        metric: A figure of summary.json or metrics.jsonl; None: what the sweep looked at, else exact match if every
            finished run has it, else the validation loss.

    Raises:
        ConfigError: A folder is missing or holds no run, or no finished run has the metric.
        StorageError: A file cannot be written.
    """
    board = rank(find([source] if isinstance(source, Path) else source), out=out, metric=metric)
    write_csv(board)
    write_json_file(board)
    write_page(board)
    return board
