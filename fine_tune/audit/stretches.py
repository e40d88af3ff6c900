"""Where the completions of a table begin and end, read off the masks alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from fine_tune.data.table import TokenTable

Places = npt.NDArray[np.int64]


def learned_stretches(table: TokenTable) -> tuple[Places, Places]:
    """Start and end in ``table.ids`` of every stretch of learned tokens, in order.

    A stretch ends where the mask, the row or, in a preference pair, the side ends.
    """
    mask = table.loss_mask
    # What may follow directly on another stretch: rows, and the rejected side on the chosen one.
    sides = [table.offsets[row] + place for row in range(len(table)) for place in table.branches(row)]
    borders = np.zeros(len(mask) + 1, np.bool_)
    borders[table.offsets] = True
    borders[np.asarray(sides, np.int64)] = True
    before = np.concatenate([[False], mask])
    after = np.concatenate([mask, [False]])
    starts = np.flatnonzero(after & (~before | borders))
    ends = np.flatnonzero(before & (~after | borders))
    return starts, ends


def row_stretches(table: TokenTable, row: int) -> list[tuple[int, int]]:
    """Start and end of the learned stretches of one row, within the row."""
    mask = np.concatenate([[False], table.row(row)[1], [False]])
    places = set(np.flatnonzero(mask[1:] != mask[:-1]).tolist()) | set(table.branches(row))
    return [(start, end) for start, end in pairwise(sorted(places)) if mask[start + 1]]
