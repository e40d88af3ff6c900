"""Which source row became which row of a table, and what it was before it was cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fine_tune.data.collect import Item
from fine_tune.data.table import TokenTable
from fine_tune.text.conversation import RowRefused, SourceRow
from fine_tune.text.encode import Encoded, Encoder
from fine_tune.text.pairs import EncodedPair, encode_rows

Whole = Encoded | EncodedPair | RowRefused


@dataclass(frozen=True)
class Placed:
    """A row of the sources.

    Attributes:
        row: As it was read.
        source: Where from.
        split: ``train`` or ``val``.
        table: The table of its split.
        index: Its place there; None for a row that was dropped.
    """

    row: SourceRow
    source: str
    split: str
    table: TokenTable
    index: int | None


def place(items: Sequence[Item], table: TokenTable, split: str) -> list[Placed]:
    """Find each row in the table, which holds the kept ones in their order."""
    found = []
    at = 0
    for item in items:
        is_kept = at < len(table) and table.row_ids[at] == item.name
        found.append(Placed(item.row, item.source, split, table, at if is_kept else None))
        at += is_kept
    return found


def encode_whole(rows: Sequence[Placed], encoder: Encoder) -> Iterator[tuple[Placed, Whole]]:
    """Encode rows as training does, before any is cut."""
    return zip(rows, encode_rows(encoder, [placed.row for placed in rows]), strict=True)


def is_as_encoded(placed: Placed, whole: Whole) -> bool:
    """Tell whether the table holds a row in the ids, the mask and the sides that the encoder gives it."""
    if placed.index is None or isinstance(whole, RowRefused):
        return False
    ids, mask = placed.table.row(placed.index)
    same = ids.tolist() == whole.input_ids and mask.tolist() == whole.loss_mask
    return same and placed.table.branches(placed.index) == whole.branches
