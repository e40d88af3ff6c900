"""The data ledger of a run as a table: what was read, kept, cut and dropped, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fine_tune.report.histogram import Histogram, histogram
from fine_tune.report.reading import section
from fine_tune.report.tables import Cell, Table, cell
from fine_tune.report.visible import brief, number, plain

COLUMNS = ("source", "split", "read", "kept", "cut", "dropped", "tokens kept", "learned")
REASONS = ("reason", "source", "split", "rows", "for example")
# Rows that are named as examples of a reason.
MAX_NAMED = 2
# Width of the longest bar in the drawing's own units.
BAR = 240


@dataclass(frozen=True)
class Bar:
    """One percentile of the rows' lengths."""

    label: str
    tokens: str
    width: str
    over: bool


@dataclass(frozen=True)
class Account:
    """What became of the rows."""

    lost: str
    parts: Table
    reasons: Table | None
    lengths: tuple[Bar, ...]
    histogram: Histogram | None
    limit: str
    limit_at: str


def account(ledger: Mapping[str, Any]) -> Account | None:
    """Lay out data_ledger.json; None if there is none."""
    if not ledger:
        return None
    named = ledger.get("parts")
    parts = [part for part in named if isinstance(part, dict)] if isinstance(named, list) else []
    total = {**ledger, "source": "all", "split": ""}
    reasons = tuple(row for part in parts or [total] for row in _reasons(part))
    limit = number(ledger.get("max_seq_len"))
    longest = max(
        [number(v) or 0.0 for v in section(dict(ledger), "length_percentiles").values()] + [limit or 0.0, 1.0]
    )
    return Account(
        plain(ledger.get("lost_share"), "{:.1%}"),
        Table("rows", COLUMNS, tuple(_counts(part) for part in ([*parts, total] if len(parts) != 1 else parts))),
        Table("reasons", REASONS, reasons) if reasons else None,
        tuple(_bars(ledger, longest, limit)),
        histogram(section(dict(ledger), "length_histogram"), limit),
        "" if limit is None else plain(ledger["max_seq_len"]),
        f"{(limit or 0.0) / longest * BAR:.1f}",
    )


def _counts(part: Mapping[str, Any]) -> tuple[Cell, ...]:
    tokens = section(dict(part), "tokens")
    figures = (part.get("read"), part.get("kept"), _sum(part.get("cut")), _sum(part.get("dropped")))
    return (
        Cell(plain(part.get("source"))),
        Cell(plain(part.get("split"))),
        *(cell(value) for value in (*figures, tokens.get("kept"), tokens.get("supervised"))),
    )


def _sum(counts: Any) -> Any:
    """Add up counts by reason; what is no such mapping is shown as it is."""
    if not isinstance(counts, dict):
        return counts
    return sum(number(value) or 0.0 for value in counts.values())


def _reasons(part: Mapping[str, Any]) -> Iterator[tuple[Cell, ...]]:
    examples = section(dict(part), "examples")
    for kind in ("dropped", "cut"):
        for reason, count in section(dict(part), kind).items():
            named = examples.get(reason) if kind == "dropped" else None
            shown = ", ".join(plain(name) for name in named[:MAX_NAMED]) if isinstance(named, list) else ""
            yield (
                Cell(f"{kind}: {brief(str(reason), 200)}"),
                Cell(plain(part.get("source"))),
                Cell(plain(part.get("split"))),
                cell(count),
                Cell(brief(shown, 400)),
            )


def _bars(ledger: Mapping[str, Any], longest: float, limit: float | None) -> Iterator[Bar]:
    for name, value in section(dict(ledger), "length_percentiles").items():
        length = number(value)
        if length is not None:
            width = f"{max(length, 0.0) / longest * BAR:.1f}"
            yield Bar(brief(str(name), 200), plain(value), width, limit is not None and length > limit)
