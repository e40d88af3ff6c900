"""One item of the checklist, and the list as people and programs read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from fine_tune.errors import ChecklistFailed
from fine_tune.visible import visible


@dataclass(frozen=True)
class Item:
    """What was checked, and what was seen; ``passed`` is None where there was nothing to check."""

    name: str
    passed: bool | None
    says: str

    @property
    def mark(self) -> str:
        """One word for the table."""
        return {True: "passed", False: "FAILED", None: "-"}[self.passed]


def as_table(items: Sequence[Item]) -> Table:
    """Lay items out for the terminal, without a frame."""
    table = Table(box=box.SIMPLE, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for item in items:
        style = {True: "green", False: "bold red", None: "dim"}[item.passed]
        # Texts of rows are among what an item says.
        table.add_row(item.name, Text(item.mark, style=style), Text(visible(item.says)))
    return table


def as_plain(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Return the items as JSON holds them."""
    return [asdict(item) for item in items]


def refuse_failed(items: Sequence[Item]) -> None:
    """Stop the run where an item failed.

    Raises:
        ChecklistFailed: All that failed.
    """
    if failed := [item for item in items if item.passed is False]:
        raise ChecklistFailed([f"{item.name}: {item.says}" for item in failed])
