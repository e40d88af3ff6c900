"""Intervals, the cells of the heat map and the lines over settings, as numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from fine_tune.board.heat import heat_map
from fine_tune.board.metric import wilson
from fine_tune.board.parallel import BOTTOM, HIGH, TOP, parallel

from .conftest import board_of, config, held_out, write_run


@pytest.mark.parametrize(
    ("share", "items", "low", "high"),
    # Digits of statsmodels' proportion_confint(method="wilson").
    [(0.9, 200, 0.850594, 0.934330), (0.0, 10, 0.0, 0.277533), (1.0, 200, 0.981155, 1.0), (0.5, 2, 0.094531, 0.905469)],
)
def test_the_interval_of_a_share(share: float, items: int, low: float, high: float) -> None:
    assert wilson(share, items) == pytest.approx((low, high), abs=1e-6)


def test_an_interval_needs_the_items_of_this_very_figure(tmp_path: Path) -> None:
    asked = {"right": (0.9, 200), "other": (0.8, 200), "none": (0.9, 0), "text": (0.9, "200")}
    for name, (figure, items) in asked.items():
        held_out(write_run(tmp_path / name, config(), exact_match=0.9), figure, items)  # type: ignore[arg-type]
    found = {row.name: row.interval for row in board_of(tmp_path).rows}
    assert found.pop("right") == wilson(0.9, 200)
    assert set(found.values()) == {None}


def test_cells_of_the_heat_map(sweep: Path) -> None:
    drawn = heat_map(board_of(sweep))
    assert drawn is not None
    assert (drawn.x_key, drawn.x_labels) == ("method.rank", ("0", "8", "16", "64"))
    assert (drawn.y_key, drawn.y_labels) == ("method.alpha", ("32", "16"))
    assert [[cell.text for cell in row] for row in drawn.rows] == [
        ["", "0.750", "failed", "0.250"], ["failed", "0.500", "0.900", "0.900"],
    ]  # fmt: skip
    inks = [[cell.ink for cell in row] for row in drawn.rows]
    # Strongest at 0.9, faintest at 0.25, and 0.5 is 25/65 of the way: 0.06 + 0.49 * 25 / 65.
    assert inks == [[None, 0.437, None, 0.06], [None, 0.248, 0.55, 0.55]]
    assert [cell.best for row in drawn.rows for cell in row] == [False] * 6 + [True, True]
    assert "method.alpha=32, method.rank=0: not run" in drawn.says


def test_less_is_stronger_where_less_is_better(sweep: Path) -> None:
    drawn = heat_map(board_of(sweep, metric="final_loss"))
    assert drawn is not None
    assert [cell.ink for cell in drawn.rows[1]][1:] == [0.55, 0.48, 0.06]


def test_rank_and_alpha_are_taken_of_three_keys_and_a_cell_shows_its_best(tmp_path: Path) -> None:
    for number, (rank_, alpha, seed) in enumerate((r, a, s) for r in (8, 16) for a in (16, 32) for s in (1, 2)):
        cfg = config(seed=seed, method__rank=rank_, method__alpha=alpha)
        write_run(tmp_path / f"run{number}", cfg, exact_match=number / 10)
    drawn = heat_map(board_of(tmp_path))
    assert drawn is not None
    assert (drawn.x_key, drawn.y_key, drawn.several) == ("method.rank", "method.alpha", True)
    assert [[cell.text for cell in row] for row in drawn.rows] == [["0.300", "0.700"], ["0.100", "0.500"]]
    assert "method.alpha=32, method.rank=16: 0.700 (best of 2), run7" in drawn.says


def test_a_search_of_values_that_never_come_twice_draws_no_map(tmp_path: Path) -> None:
    for number in range(12):
        cfg = config(method__rank=number + 1, method__alpha=number * 3 + 0.5)
        write_run(tmp_path / f"run{number}", cfg, exact_match=number / 20)
    board = board_of(tmp_path)
    drawn = parallel(board)
    assert heat_map(board) is None
    assert drawn is not None
    assert [(axis.title, [label for _, label in axis.labels]) for axis in drawn.axes] == [
        ("method.alpha", ["0.5", "18.5", "33.5"]), ("method.rank", ["1", "7", "12"]), ("exact_match", ["0.550", "0.000"]),
    ]  # fmt: skip


def test_lines_run_from_setting_to_figure(sweep: Path) -> None:
    drawn = parallel(board_of(sweep))
    assert drawn is not None
    bottom, top = HIGH - BOTTOM, TOP
    labels = [[label for _, label in axis.labels] for axis in drawn.axes]
    assert labels == [["0", "8", "16", "64"], ["16", "32"], ["0.900", "0.250"]]
    ys = {
        line.says.partition(":")[0]: [float(p.partition(",")[2]) for p in line.points.split()] for line in drawn.lines
    }
    third = (bottom - top) / 3
    assert ys["r64-a16"] == pytest.approx([top, bottom, top], abs=0.1)
    assert ys["r8-a32"] == pytest.approx([bottom - third, top, top + (bottom - top) * 15 / 65], abs=0.1)
    assert len(ys["r16-a32"]) == 2  # no figure: its line ends before that axis
    assert [line.best for line in drawn.lines][-2:] == [True, True]
