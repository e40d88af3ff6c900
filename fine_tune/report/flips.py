"""Items on which two checkpoints differ, with what each of them said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fine_tune.report.reading import EvaluationFiles, RunFiles, read_lines
from fine_tune.report.tables import Cell, Table, cell
from fine_tune.report.visible import plain

MAX_FLIPS = 100
ITEMS = "items.jsonl"


def flipped(run: RunFiles, evaluation: EvaluationFiles, verdict: Mapping[str, Any]) -> Table | None:
    """Lay out the items that a verdict names as gained and lost; None if it names none or their file is not there."""
    changed = [(change, name) for change in ("lost", "gained") for name in _ids(verdict.get(change))]
    if not changed:
        return None
    wanted = {name for _, name in changed[:MAX_FLIPS]}
    said = {label: _items(run, place, wanted) for label, place in _sides(evaluation, verdict)}
    return flips_table(changed, {label: items for label, items in said.items() if items})


def flips_table(
    changed: Sequence[tuple[str, str]], said: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> Table | None:
    """Lay out flips; None without any item to show.

    Args:
        changed: ``lost`` or ``gained``, and the item's id.
        said: The items of each side by id, by the side's name.
    """
    if not said or not changed:
        return None
    rows = tuple(_row(change, name, list(said.values())) for change, name in changed[:MAX_FLIPS])
    columns = ("flip", "id", "prompt", "wanted", *(f"{label} said" for label in said))
    return Table("flipped items", columns, rows, max(0, len(changed) - MAX_FLIPS))


def _ids(value: Any) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def _sides(evaluation: EvaluationFiles, verdict: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """Find the items of both checkpoints: in folders of their names, below or beside the verdict, or with the verdict itself."""
    # Names are looked up among what is there, never joined to a path: they come from a file.
    here = [*evaluation.path.iterdir(), *evaluation.path.parent.iterdir()]
    known = {place.name: place for place in reversed(here) if (place / ITEMS).is_file()}
    names = _ids(verdict.get("names"))
    found = [(name, known[name]) for name in names if name in known]
    if not found and (evaluation.path / ITEMS).is_file():
        found = [(names[-1] if names else "it", evaluation.path)]
    yield from found


def _items(run: RunFiles, place: Path, wanted: set[str]) -> dict[str, dict[str, Any]]:
    lines = read_lines(run, place / ITEMS)
    return {line["id"]: line for line in lines if isinstance(line.get("id"), str) and line["id"] in wanted}


def _row(change: str, name: str, sides: Sequence[Mapping[str, Mapping[str, Any]]]) -> tuple[Cell, ...]:
    item = next((items[name] for items in sides if name in items), {})
    answers = (Cell(_said(items.get(name, {}))) for items in sides)
    return (Cell(change), cell(name), Cell(plain(item.get("prompt"))), Cell(plain(item.get("target"))), *answers)


def _said(item: Mapping[str, Any]) -> str:
    return plain(item.get("completion", item.get("choice")))
