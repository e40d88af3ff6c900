"""How many rows have which length, as bars: what a template needs to draw them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fine_tune.report.visible import number, plain

# Height and width of the drawing, in its own units, and the room above the highest bar.
HIGH, WIDE, ABOVE = 110, 400, 14
MAX_BINS = 200
# Beyond this the width of a bin may be no float any more.
LARGEST = 1e15


@dataclass(frozen=True)
class Bin:
    """One bar of the histogram of lengths, in the drawing's units."""

    x: str
    y: str
    width: str
    height: str
    says: str
    over: bool


@dataclass(frozen=True)
class Histogram:
    """Bars, and what the ends of the axes mean."""

    bins: tuple[Bin, ...]
    shortest: str
    longest: str
    most: str


def histogram(counted: Mapping[str, Any], limit: float | None) -> Histogram | None:
    """Draw the counts of a ledger; None if there are none, or they do not fit together.

    Args:
        counted: ``edges`` in tokens, rising, and ``counts`` of the rows from each edge to below the next.
        limit: Length from which on rows are too long.
    """
    edges, counts = (_numbers(counted.get(key)) for key in ("edges", "counts"))
    rising = all(low < high for low, high in pairwise(edges))
    if not rising or len(edges) != len(counts) + 1 or not 0 < len(counts) <= MAX_BINS or min(counts) < 0:
        return None
    if max(map(abs, [*edges, *counts])) > LARGEST:
        return None
    return Histogram(tuple(_bins(edges, counts, limit)), plain(edges[0]), plain(edges[-1] - 1), plain(max(counts)))


def _bins(edges: Sequence[float], counts: Sequence[float], limit: float | None) -> Iterator[Bin]:
    most, low, span = max(counts) or 1.0, edges[0], edges[-1] - edges[0]
    for count, (start, end) in zip(counts, pairwise(edges), strict=True):
        height = count / most * (HIGH - ABOVE)
        yield Bin(
            f"{(start - low) / span * WIDE:.1f}",
            f"{HIGH - height:.1f}",
            f"{max((end - start) / span * WIDE - 1, 0.5):.1f}",
            f"{height:.1f}",
            f"{plain(start)} to {plain(end - 1)} tokens: {plain(count)} rows",
            limit is not None and start > limit,
        )


def _numbers(values: Any) -> list[float]:
    found = [number(value) for value in values] if isinstance(values, list) else []
    return [value for value in found if value is not None]
