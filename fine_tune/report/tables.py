"""Any JSON as tables that a page can show: verdicts and metrics come from files whose fields may grow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fine_tune.report.visible import brief, number, plain

MAX_ROWS = 200
MAX_COLUMNS = 12
MAX_CELL = 600
# Short lists, such as both ends of an interval, stand in one line.
MAX_INLINE = 3
# Words a verdict is told in, and the colour of each.
TONES = {"better": "good", "worse": "bad", "cannot tell": "open"}
# What a verdict's sentence, its place and its colour tell already.
TOLD = ("sentence", "word", "field", "called", "higher_is_better", "binary", "names")


@dataclass(frozen=True)
class Cell:
    """One value of a table; figures stand to the right."""

    text: str
    figure: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under named columns; ``left_out`` counts rows beyond the shown ones."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    left_out: int = 0


@dataclass(frozen=True)
class Shown:
    """A JSON object for a reader: its single values as label and text, its nested ones as tables."""

    facts: tuple[tuple[str, str], ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """One comparison: where it was found, its sentence, the colour of its outcome, and everything else it says."""

    source: str
    sentence: str
    tone: str
    shown: Shown = field(default_factory=Shown)
    flips: str = ""


def cell(value: Any) -> Cell:
    """Write one value."""
    return Cell(brief(plain(value), MAX_CELL), number(value) is not None)


class Label(str):
    """A key that holds somebody's name, such as a run's, and is shown as it is."""


def words(key: Any) -> str:
    """Write a key the way people write: without underscores, but for those of a name."""
    text = brief(str(key), 120)
    return text if isinstance(key, Label) else text.replace("_", " ")


def show(tree: Mapping[str, Any], *, skip: Sequence[str] = ()) -> Shown:
    """Part an object into single values and tables.

    Example:
        >>> shown = show({"num_items": 3, "groups": {"law": {"n": 2}, "art": {"n": 1}}})
        >>> shown.facts, shown.tables[0].columns, [row[0].text for row in shown.tables[0].rows]
        ((('num items', '3'),), ('groups', 'n'), ['law', 'art'])
    """
    facts: list[tuple[str, str]] = []
    tables: list[Table] = []
    for key, value in tree.items():
        if key in skip:
            continue
        if isinstance(value, list) and 0 < len(value) <= MAX_INLINE and not any(_nested(entry) for entry in value):
            facts.append((words(key), brief(", ".join(plain(entry) for entry in value), MAX_CELL)))
        elif _nested(value) and value:
            tables += _tables(key, value)
        elif value not in (None, {}, []):
            facts.append((words(key), cell(value).text))
    return Shown(tuple(facts), tuple(tables))


def verdict(source: str, tree: Mapping[str, Any], flips: Table | None = None) -> Verdict:
    """Lay out a verdict: its sentence first, the flipped items as a table if they are known, then all else in its file."""
    sentence = tree.get("sentence")
    said = sentence if isinstance(sentence, str) else ""
    outcomes = [value.replace("_", " ") for value in tree.values() if isinstance(value, str)]
    tone = next((TONES[outcome] for outcome in outcomes if outcome in TONES), "open")
    told = TOLD if said else ()
    told = told if flips is None else (*told, "gained", "lost")
    shown = show(_with_names(tree), skip=told)
    if flips is None:
        return Verdict(source, brief(said), tone, shown)
    count = len(flips.rows) + flips.left_out
    number_of = f"{count:,} flipped {'item' if count == 1 else 'items'}"
    # The items themselves before figures by group: they are what a reader can judge.
    return Verdict(source, brief(said), tone, Shown(shown.facts, (flips, *shown.tables)), number_of)


def _with_names(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Name the two sides, which a verdict calls a and b, in its keys and in those of its groups."""
    names = tree.get("names")
    if not isinstance(names, list) or len(names) != 2 or not all(isinstance(name, str) for name in names):
        return dict(tree)
    sides = {"mean_a": Label(f"mean of {names[0]}"), "mean_b": Label(f"mean of {names[1]}")}
    groups = tree.get("groups")
    renamed = {sides.get(key, key): value for key, value in tree.items()}
    if isinstance(groups, list) and all(isinstance(group, dict) for group in groups):
        renamed["groups"] = [{sides.get(key, key): value for key, value in group.items()} for group in groups]
    return renamed


def _tables(key: str, value: Any) -> Iterator[Table]:
    if isinstance(value, list):
        if all(isinstance(row, dict) for row in value):
            yield _of_rows(words(key), [("", row) for row in value], named=False)
        else:
            entries = tuple((cell(entry),) for entry in value[:MAX_ROWS])
            yield Table(words(key), (words(key),), entries, max(0, len(value) - MAX_ROWS))
    elif all(isinstance(row, dict) for row in value.values()):
        yield _of_rows(words(key), list(value.items()), named=True)
    elif any(_is_list_of_objects(inner) for inner in value.values()):
        # One level of names above lists, such as flips by direction.
        for name, inner in value.items():
            yield from _tables(f"{key}: {name}", inner if isinstance(inner, list | dict) and inner else [inner])
    else:
        pairs = tuple((Cell(words(name)), cell(inner)) for name, inner in list(value.items())[:MAX_ROWS])
        yield Table(words(key), (words(key), "value"), pairs, max(0, len(value) - MAX_ROWS))


def _nested(value: Any) -> bool:
    return isinstance(value, dict | list)


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(entry, dict) for entry in value)


def _of_rows(title: str, rows: Sequence[tuple[str, Mapping[str, Any]]], *, named: bool) -> Table:
    """Lay out objects as rows: columns are all their keys, in the order they first appear."""
    kept = rows[:MAX_ROWS]
    keys = list(dict.fromkeys(key for _, row in kept for key in row))[:MAX_COLUMNS]
    columns = ([title] if named else []) + [words(key) for key in keys]
    lines = (
        (*([Cell(words(name))] if named else []), *(cell(row[key]) if key in row else Cell("") for key in keys))
        for name, row in kept
    )
    return Table(title, tuple(columns), tuple(tuple(line) for line in lines), len(rows) - len(kept))
