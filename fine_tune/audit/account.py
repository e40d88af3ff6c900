"""What the tables of a run hold: how much is learned, what ends in a stop token, what is said again and again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fine_tune.audit.stretches import Places, learned_stretches
from fine_tune.data.table import TokenTable

MAX_NAMED = 5
MAX_FREQUENT = 5


@dataclass(frozen=True)
class Account:
    """Figures over all rows, training and validation together.

    Attributes:
        num_rows: Rows.
        num_tokens: Tokens.
        num_learned: Learned tokens.
        num_turns: Learned stretches: assistant turns, sides of pairs, documents.
        num_stops: Those that end in the stop token.
        num_unknown: Unknown tokens.
        num_repeated: Training rows with the tokens and the mask of an earlier one.
        masked: Ids of the first rows in which nothing is learned.
        doubled_bos: Ids of the first rows with one BOS token behind another.
        num_without_bos: Rows that do not begin with the BOS token; 0 where the tokenizer has none.
        frequent: How often each of the most frequent learned stretches of the training rows occurs, and its ids.
        num_train_turns: Learned stretches of the training rows.
    """

    num_rows: int
    num_tokens: int
    num_learned: int
    num_turns: int
    num_stops: int
    num_unknown: int
    num_repeated: int
    masked: tuple[str, ...]
    doubled_bos: tuple[str, ...]
    num_without_bos: int
    frequent: tuple[tuple[int, tuple[int, ...]], ...]
    num_train_turns: int

    @property
    def learned_share(self) -> float:
        """Learned tokens over tokens."""
        return self.num_learned / self.num_tokens if self.num_tokens else 0.0

    @property
    def stop_rate(self) -> float:
        """Share of the turns whose stop token is learned."""
        return self.num_stops / self.num_turns if self.num_turns else 0.0

    @property
    def unknown_share(self) -> float:
        """Unknown tokens over tokens."""
        return self.num_unknown / self.num_tokens if self.num_tokens else 0.0


def take_account(train: TokenTable, val: TokenTable, tokenizer: Any, *, stop_ids: Collection[int]) -> Account:
    """Count over both tables.

    Args:
        train: Training rows.
        val: Validation rows.
        tokenizer: Names the BOS and the unknown token.
        stop_ids: What ends a turn, and a document.
    """
    tables = (train, val)
    bos, unknown = tokenizer.bos_token_id, _unknown_id(tokenizer)
    ends = [learned_stretches(table)[1] for table in tables]
    return Account(
        num_rows=len(train) + len(val),
        num_tokens=sum(len(table.ids) for table in tables),
        num_learned=sum(int(table.loss_mask.sum()) for table in tables),
        num_turns=sum(len(found) for found in ends),
        num_stops=sum(_stops(table, found, stop_ids) for table, found in zip(tables, ends, strict=True)),
        num_unknown=0 if unknown is None else sum(int((table.ids == unknown).sum()) for table in tables),
        num_repeated=_repeated(train),
        masked=_named([table.row_ids[row] for table in tables for row in np.flatnonzero(table.supervised == 0)]),
        doubled_bos=() if bos is None else _named([name for table in tables for name in _doubled(table, tokenizer)]),
        num_without_bos=0 if bos is None else sum(_without(table, bos) for table in tables),
        frequent=_frequent(train),
        num_train_turns=len(ends[0]),
    )


def _unknown_id(tokenizer: Any) -> int | None:
    """The unknown token, where it means nothing else: byte-level vocabularies name their end of text so."""
    found = tokenizer.unk_token_id
    return None if found in (tokenizer.bos_token_id, tokenizer.eos_token_id) else found


def _stops(table: TokenTable, ends: Places, stop_ids: Collection[int]) -> int:
    return int(np.isin(table.ids[ends - 1], list(stop_ids)).sum())


def _without(table: TokenTable, bos: int) -> int:
    firsts = table.offsets[:-1][table.lengths > 0]
    return int((table.ids[firsts] != bos).sum())


def _doubled(table: TokenTable, tokenizer: Any) -> list[str]:
    """Rows with two BOS tokens in a row; one that is also the end of text may follow itself but at the start."""
    both = (table.ids[1:] == tokenizer.bos_token_id) & (table.ids[:-1] == tokenizer.bos_token_id)
    places = np.flatnonzero(both)
    rows = np.searchsorted(table.offsets, places, side="right") - 1
    within = np.searchsorted(table.offsets, places + 1, side="right") - 1 == rows
    if tokenizer.bos_token_id == tokenizer.eos_token_id:
        within &= places == table.offsets[rows]
    return [table.row_ids[row] for row in np.unique(rows[within])]


def _repeated(table: TokenTable) -> int:
    seen = {b"".join(part.tobytes() for part in table.row(row)) for row in range(len(table))}
    return len(table) - len(seen)


def _frequent(table: TokenTable) -> tuple[tuple[int, tuple[int, ...]], ...]:
    starts, ends = learned_stretches(table)
    counted = Counter(table.ids[start:end].tobytes() for start, end in zip(starts, ends, strict=True))
    often = [(count, said) for said, count in counted.most_common(MAX_FREQUENT) if count > 1]
    return tuple((count, tuple(np.frombuffer(said, np.int32).tolist())) for count, said in often)


def _named(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(names[:MAX_NAMED])
