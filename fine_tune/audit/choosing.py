"""Which rows are looked at: the longest, the shortest, some at random, some that were cut, some that were dropped."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

from fine_tune.audit.placing import Placed, Whole, encode_whole
from fine_tune.data.ledger import BY_DESIGN, Ledger
from fine_tune.text.conversation import Document, PreferencePair, RowRefused, SourceRow
from fine_tune.text.encode import Encoder

# Rows whose prompts are compared beside the shown ones, and rows that are tried to find some that were cut.
SAMPLE = 200
TRIED = 512


def kept_kinds(rows: Sequence[Placed], *, number: int, seed: int) -> Iterator[tuple[str, Placed]]:
    """Choose training rows that were kept; none is chosen twice."""
    kept = [row for row in rows if row.index is not None and row.split == "train"]
    by_length = sorted(kept, key=lambda row: int(row.table.lengths[row.index or 0]))
    chosen: set[int] = set()
    drawn = random.Random(seed).sample(kept, min(len(kept), 3 * number))
    for kind, candidates in (("longest", by_length[::-1]), ("shortest", by_length), ("random", drawn)):
        for row in _fresh(candidates, chosen, number):
            yield kind, row


def _fresh(rows: Iterable[Placed], chosen: set[int], number: int) -> Iterator[Placed]:
    taken = 0
    for row in rows:
        if taken < number and id(row) not in chosen:
            chosen.add(id(row))
            taken += 1
            yield row


def sample(rows: Sequence[Placed], *, seed: int) -> list[Placed]:
    """Draw kept rows of both splits."""
    kept = [row for row in rows if row.index is not None]
    return random.Random(f"sample-{seed}").sample(kept, min(len(kept), SAMPLE))


def cut_rows(rows: Sequence[Placed], encoder: Encoder, *, number: int, max_seq_len: int) -> list[tuple[Placed, Whole]]:
    """Find rows that lost tokens among those with the longest texts, and return those that were the shortest."""
    kept = sorted((row for row in rows if row.index is not None), key=lambda row: -_characters(row.row))
    encoded = [pair for pair in encode_whole(kept[:TRIED], encoder) if _length(pair[1]) > max_seq_len]
    return sorted(encoded, key=lambda pair: _length(pair[1]))[:number]


def dropped_rows(rows: Sequence[Placed], ledger: Ledger, *, number: int) -> Iterator[tuple[str, str, Placed | None]]:
    """Yield reason, id and, where there is one, the row of some that were lost; what was left out by design is not.

    Rows that a reader turns away have no row.
    """
    dropped = {(row.source, row.row.id): row for row in rows if row.index is None}
    for (source, _), tally in ledger.tallies.items():
        for reason, names in tally.examples.items():
            if reason not in BY_DESIGN:
                for name in names[:number]:
                    yield reason, name, dropped.get((source, name))


def _characters(row: SourceRow) -> int:
    if isinstance(row, Document):
        return len(row.text)
    if isinstance(row, PreferencePair):
        return sum(len(m.content) for m in row.prompt) + max(len(row.chosen), len(row.rejected))
    return sum(len(message.content) for message in row.messages)


def _length(whole: Whole) -> int:
    return 0 if isinstance(whole, RowRefused) else whole.longest
