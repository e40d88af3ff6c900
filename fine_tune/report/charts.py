"""Lines over steps as coordinates: what a template needs to draw a figure, and nothing of its looks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fine_tune.report.visible import number, plain

# The drawing's own units; the page scales it.
WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 26
# Up to this many points stand apart and get a mark; more are a line.
MAX_MARKS = 24
# A longer line is thinned to this many stretches, each with its lowest and highest point.
MAX_STRETCHES = 250
# Beyond this the distance of two values may be no float any more.
LARGEST = 1e300

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a figure: its label, its points as (step, value), None for what cannot be drawn."""

    label: str
    points: Sequence[tuple[float, float | None]]
    colour: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Mark:
    """A single point and what it says when pointed at."""

    x: str
    y: str
    says: str


@dataclass(frozen=True)
class Drawn:
    """One line in coordinates of the drawing; ``gaps`` counts values that cannot be drawn."""

    label: str
    last: str
    colour: int
    dashed: bool
    lines: tuple[str, ...]
    marks: tuple[Mark, ...]
    gaps: int


@dataclass(frozen=True)
class Tick:
    """A place on an axis and its label."""

    at: str
    label: str


@dataclass(frozen=True)
class Chart:
    """A figure, ready to draw."""

    title: str
    unit: str
    drawn: tuple[Drawn, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]

    @property
    def says(self) -> str:
        """The figure in words, for those who cannot see it."""
        return f"{self.title} over steps: " + "; ".join(f"{line.label} ends at {line.last}" for line in self.drawn)


def series_of(lines: Sequence[dict[str, Any]], key: str, label: str, **looks: Any) -> Series:
    """Take one measurement out of the lines of metrics.jsonl, by rising step; the later of two lines of a step counts."""
    found: dict[float, float | None] = {}
    for line in lines:
        step = number(line.get("step"))
        if step is not None and abs(step) < LARGEST and key in line:
            value = number(line[key])
            found[step] = value if value is None or abs(value) < LARGEST else None
    return Series(label, sorted(found.items()), **looks)


def draw(title: str, series: Sequence[Series], *, unit: str = "") -> Chart | None:
    """Scale lines to the drawing; None if not one finite value is among them."""
    shown = [line for line in series if any(value is not None for _, value in line.points)]
    if not shown:
        return None
    steps = [step for line in shown for step, _ in line.points]
    values = [value for line in shown for _, value in line.points if value is not None]
    x_low, x_high = _widened(min(steps), max(steps))
    y_ticks = ticks(*_widened(min(values), max(values)))
    y_low, y_high = min(y_ticks[0], min(values)), max(y_ticks[-1], max(values))
    place = _Frame(x_low, x_high, y_low, y_high)
    return Chart(
        title,
        unit,
        tuple(_drawn(line, place) for line in shown),
        tuple(Tick(place.x(t), _label(t)) for t in _whole(ticks(x_low, x_high, 5)) if x_low <= t <= x_high),
        tuple(Tick(place.y(t), _label(t)) for t in y_ticks),
    )


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Return round numbers that enclose a range.

    Example:
        >>> ticks(0.0, 3.95)
        [0.0, 1.0, 2.0, 3.0, 4.0]
    """
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _whole(places: Sequence[float]) -> Sequence[float]:
    """Leave out places between two steps, unless there are no others."""
    whole = [place for place in places if place.is_integer()]
    return whole if len(whole) > 1 else places


@dataclass(frozen=True)
class _Frame:
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, step: float) -> str:
        return _placed(step, self.x_low, self.x_high, LEFT, WIDTH - RIGHT)

    def y(self, value: float) -> str:
        return _placed(value, self.y_low, self.y_high, HEIGHT - BOTTOM, TOP)


def _placed(value: float, low: float, high: float, start: float, end: float) -> str:
    share = (value - low) / (high - low)
    return f"{start + share * (end - start):.1f}"


def _widened(low: float, high: float) -> tuple[float, float]:
    """Give a flat line a height, and a range too small for its own digits one that has some."""
    least = max(abs(low), abs(high)) * 1e-9 or 1e-12
    if high - low >= least:
        return low, high
    room = max(abs(low), abs(high)) * 0.1 or 1.0
    return low - room, high + room


def _drawn(line: Series, place: _Frame) -> Drawn:
    finite = [(step, value) for step, value in line.points if value is not None]
    marked = len(finite) <= MAX_MARKS
    stretches = list(_stretches(line.points))
    if line.dashed and len(finite) <= 2:
        # Between a first and a last validation nothing was measured, and a straight line would say otherwise.
        stretches = [[point] for point in finite]
    # A point between two gaps would be no line at all.
    alone = [stretch[0] for stretch in stretches if len(stretch) == 1]
    return Drawn(
        line.label,
        plain(finite[-1][1]),
        line.colour,
        line.dashed,
        tuple(" ".join(f"{place.x(x)},{place.y(y)}" for x, y in _thinned(s)) for s in stretches if len(s) > 1),
        tuple(
            Mark(place.x(x), place.y(y), f"{line.label}, step {plain(x)}: {plain(y)}")
            for x, y in (finite if marked else alone)
        ),
        len(line.points) - len(finite),
    )


def _stretches(points: Sequence[tuple[float, float | None]]) -> Iterator[list[Point]]:
    """Part a line where a value is missing."""
    stretch: list[Point] = []
    for step, value in points:
        if value is not None:
            stretch.append((step, value))
        elif stretch:
            yield stretch
            stretch = []
    if stretch:
        yield stretch


def _thinned(points: Sequence[Point]) -> Iterator[Point]:
    """Keep the ends and, of every stretch, the lowest and the highest point: no peak is lost."""
    size = math.ceil(len(points) / MAX_STRETCHES)
    if size <= 2:
        yield from points
        return
    yield points[0]
    for start in range(1, len(points) - 1, size):
        part = points[start : min(start + size, len(points) - 1)]
        extremes = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        yield from sorted(extremes)
    yield points[-1]


def _label(value: float) -> str:
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        mantissa, exponent = f"{value:.3g}".partition("e")[::2] if "e" in f"{value:.3g}" else (f"{value:.3g}", "")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return f"{value:,.6g}"
