"""Coordinates of figures: where points lie, what is not drawn, and what is said about it."""

from __future__ import annotations

import math

import pytest

from fine_tune.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Series, draw, series_of, ticks


def test_ends_of_a_line_lie_on_the_ends_of_the_axes() -> None:
    chart = draw("Loss", [Series("train", [(0, 4.0), (50, 1.0), (100, 0.0)])], unit="nats")
    assert chart is not None
    middle = HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) / 4
    centre = (LEFT + WIDTH - RIGHT) / 2
    assert chart.drawn[0].lines == (
        f"{LEFT}.0,{TOP}.0 {centre:.1f},{middle:.1f} {WIDTH - RIGHT}.0,{HEIGHT - BOTTOM}.0",
    )
    assert [(mark.x, mark.says) for mark in chart.drawn[0].marks][1] == (f"{centre:.1f}", "train, step 50: 1")
    assert [tick.label for tick in chart.y_ticks] == ["0", "1", "2", "3", "4"]
    assert [tick.label for tick in chart.x_ticks] == ["0", "20", "40", "60", "80", "100"]
    assert chart.says == "Loss over steps: train ends at 0"


def test_what_is_not_finite_is_a_gap_and_counted() -> None:
    lines = [
        {"step": i, "grad_norm": value} for i, value in enumerate([1.0, 2.0, None, math.nan, 3.0, math.inf, 4.0, 5.0])
    ]
    chart = draw("Gradient norm", [series_of(lines, "grad_norm", "per step")])
    assert chart is not None
    (line,) = chart.drawn
    assert line.gaps == 3
    assert [len(points.split()) for points in line.lines] == [2, 2]
    assert len(line.marks) == 5
    assert line.last == "5"


def test_a_point_between_gaps_is_marked_even_in_a_long_line() -> None:
    points = [(float(i), float(i)) for i in range(100)] + [(100.0, None), (101.0, 7.0), (102.0, None)]
    chart = draw("x", [Series("x", points)])
    assert chart is not None
    assert [mark.says for mark in chart.drawn[0].marks] == ["x, step 101: 7"]


def test_two_validations_are_points_and_not_a_line() -> None:
    chart = draw("Loss", [Series("val", [(0, 4.0), (9, 1.0)], dashed=True), Series("train", [(1, 3.0), (9, 1.0)])])
    assert chart is not None
    assert [len(line.lines) for line in chart.drawn] == [0, 1]
    assert [len(line.marks) for line in chart.drawn] == [2, 2]


def test_a_long_line_is_thinned_and_keeps_its_peaks() -> None:
    values = [math.sin(i / 50) for i in range(20_000)]
    values[12_345], values[7_001] = 9.0, -9.0
    chart = draw("x", [Series("x", list(enumerate(values)))])
    assert chart is not None
    points = [tuple(map(float, point.split(","))) for point in chart.drawn[0].lines[0].split()]
    assert len(points) <= 510
    low, high = (next(float(t.at) for t in chart.y_ticks if t.label == label) for label in ("-10", "10"))
    heights = [y for _, y in points]
    assert max(heights) == pytest.approx(low + (high - low) * 0.05, abs=0.1)
    assert min(heights) == pytest.approx(low + (high - low) * 0.95, abs=0.1)
    assert [x for x, _ in points] == sorted(x for x, _ in points)


@pytest.mark.parametrize("value", [0.0, 1.0, -3e-12, 5e299, -9e299, 1e-320, 0.1 + 0.2])
def test_a_flat_line_has_a_place(value: float) -> None:
    chart = draw("x", [Series("x", [(1, value), (2, value)])])
    assert chart is not None
    for point in chart.drawn[0].lines[0].split():
        x, y = map(float, point.split(","))
        assert LEFT <= x <= WIDTH - RIGHT
        assert TOP <= y <= HEIGHT - BOTTOM


def test_the_largest_numbers_are_drawn_and_larger_ones_are_gaps() -> None:
    lines = [{"step": 1, "x": -9e299}, {"step": 2, "x": 9e299}, {"step": 3, "x": 1.7e308}, {"step": 1.7e308, "x": 1}]
    chart = draw("x", [series_of(lines, "x", "x")])
    assert chart is not None
    (first, last) = (tuple(map(float, point.split(","))) for point in chart.drawn[0].lines[0].split())
    assert TOP <= last[1] < first[1] <= HEIGHT - BOTTOM
    assert chart.drawn[0].gaps == 1


@pytest.mark.parametrize("points", [[], [(1.0, None)], [(1.0, None), (2.0, None)]])
def test_without_a_finite_value_there_is_no_figure(points: list[tuple[float, float | None]]) -> None:
    assert draw("x", [Series("x", points)]) is None


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [(0.0, 1.0, [0, 0.5, 1]), (0.4, 1.0, [0.4, 0.6, 0.8, 1.0]), (-6.0, 0.0, [-6, -4, -2, 0]), (0.0, 3e-4, [0, 1e-4, 2e-4, 3e-4])],
)  # fmt: skip
def test_ticks_are_round_and_enclose(low: float, high: float, wanted: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(wanted)


def test_lines_come_in_the_order_of_steps_and_the_later_of_two_counts() -> None:
    lines = [
        {"step": 2, "a": 1},
        {"step": 1, "a": 5},
        {"step": 2, "a": 3},
        {"a": 9},
        {"step": "3", "a": 9},
        {"step": 4, "a": "x"},
    ]
    assert series_of(lines, "a", "a").points == [(1.0, 5.0), (2.0, 3.0), (4.0, None)]


def test_a_short_run_has_no_half_steps_on_its_axis() -> None:
    chart = draw("Loss", [Series("train", [(1, 4.0), (2, 1.0), (3, 0.0)])])
    assert chart is not None
    assert [tick.label for tick in chart.x_ticks] == ["1", "2", "3"]
    between = draw("Loss", [Series("train", [(0.25, 4.0), (0.75, 1.0)])])
    assert between is not None
    assert len(between.x_ticks) > 2
