"""Prepared rows as flat arrays on top of one Arrow table."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fine_tune.text.encode import Encoded
from fine_tune.text.pairs import EncodedPair

SCHEMA = pa.schema(
    [
        ("id", pa.large_string()),
        ("input_ids", pa.large_list(pa.int32())),
        ("loss_mask", pa.large_list(pa.uint8())),
        ("branches", pa.large_list(pa.int32())),
    ]
)


class TokenTable:
    """Token ids and loss masks of many rows, laid end to end.

    Attributes:
        ids: All token ids, int32.
        loss_mask: True where a token is learned, bool, as long as `ids`.
        offsets: Row i is `ids[offsets[i]:offsets[i + 1]]`, int64.
        row_ids: Name of each row.
        lengths: Tokens of each row, int64; those of a preference pair with its prompt once.
        supervised: Learned tokens of each row, int64.
        arrow: The table underneath; the arrays are views of it (also of a memory-mapped file).
    """

    def __init__(self, arrow: pa.Table) -> None:
        """Take views of a table with the columns of `SCHEMA`."""
        self.arrow = arrow.combine_chunks()
        ids, self.offsets = _flat(self.arrow, "input_ids")
        mask, mask_offsets = _flat(self.arrow, "loss_mask")
        if not np.array_equal(self.offsets, mask_offsets):
            raise ValueError("input_ids and loss_mask of a table differ in length.")
        self.ids: npt.NDArray[np.int32] = ids
        self.loss_mask: npt.NDArray[np.bool_] = mask.view(np.bool_)
        self._branches, self._branch_offsets = _flat(self.arrow, "branches")
        self.row_ids: list[str] = self.arrow.column("id").to_pylist()
        self.lengths: npt.NDArray[np.int64] = np.diff(self.offsets)
        counted = np.concatenate([[0], np.cumsum(self.loss_mask, dtype=np.int64)])
        self.supervised: npt.NDArray[np.int64] = counted[self.offsets[1:]] - counted[self.offsets[:-1]]

    @classmethod
    def from_rows(cls, rows: Iterable[tuple[str, Encoded | EncodedPair]]) -> TokenTable:
        """Build a table from encoded rows."""
        builder = TableBuilder()
        for row_id, encoded in rows:
            builder.add(row_id, encoded)
        return builder.build()

    @classmethod
    def open(cls, file: Path) -> TokenTable:
        """Map a file that `save` wrote into memory."""
        with pa.memory_map(str(file)) as source:
            return cls(pa.ipc.open_file(source).read_all())

    def save(self, file: Path) -> None:
        """Write the table as an Arrow file."""
        with pa.ipc.new_file(str(file), SCHEMA) as writer:
            writer.write_table(self.arrow)

    def repeated(self) -> list[tuple[str, str]]:
        """Name the rows that are another row token by token, mask included, each with the first such row.

        Copies of one row that a mix asks for have one name, and are not among them.
        """
        first: dict[bytes, str] = {}
        found = []
        for index, name in enumerate(self.row_ids):
            part = slice(self.offsets[index], self.offsets[index + 1])
            content = (self.ids[part].tobytes(), self.loss_mask[part].tobytes(), repr(self.branches(index)).encode())
            earlier = first.setdefault(hashlib.sha256(b"|".join(content)).digest(), name)
            if earlier != name:
                found.append((name, earlier))
        return found

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    def row(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Token ids and loss mask of a row, as views."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a table of {len(self)} rows")
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[part], self.loss_mask[part]

    def branches(self, index: int) -> tuple[int, ...]:
        """Where the chosen and the rejected completion of a pair begin in its row; empty for any other row.

        Both follow the tokens before the first of them, the prompt; neither sees the other.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a table of {len(self)} rows")
        return tuple(self._branches[self._branch_offsets[index] : self._branch_offsets[index + 1]].tolist())


class TableBuilder:
    """Collects encoded rows as arrays: a tenth of the memory of lists of Python integers."""

    def __init__(self) -> None:
        """Start empty."""
        self._row_ids: list[str] = []
        self._ids: list[npt.NDArray[np.int32]] = []
        self._masks: list[npt.NDArray[np.uint8]] = []
        self._branches: list[npt.NDArray[np.int32]] = []

    def add(self, row_id: str, encoded: Encoded | EncodedPair) -> None:
        """Append a row."""
        self._row_ids.append(row_id)
        self._ids.append(np.asarray(encoded.input_ids, dtype=np.int32))
        self._masks.append(np.asarray(encoded.loss_mask, dtype=np.uint8))
        self._branches.append(np.asarray(encoded.branches, dtype=np.int32))

    def build(self) -> TokenTable:
        """Make the table."""
        columns = [
            pa.array(self._row_ids, pa.large_string()),
            _lists(self._ids, np.int32),
            _lists(self._masks, np.uint8),
            _lists(self._branches, np.int32),
        ]
        return TokenTable(pa.table(columns, schema=SCHEMA))


def _lists(rows: Sequence[npt.NDArray[Any]], dtype: type[np.generic]) -> pa.LargeListArray:
    """A list column of arrays."""
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], dtype=np.int64, out=offsets[1:])
    values = np.concatenate([np.empty(0, dtype), *rows])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))


def _flat(arrow: pa.Table, name: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Values and offsets of a list column, without a copy."""
    column = arrow.column(name)
    if column.num_chunks == 0:
        return np.empty(0, SCHEMA.field(name).type.value_type.to_pandas_dtype()), np.zeros(1, np.int64)
    chunk = column.chunk(0)
    offsets = chunk.offsets.to_numpy()
    return chunk.values.to_numpy(), offsets
