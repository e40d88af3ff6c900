"""Perplexity of held-out text: every learned token counts once, whatever batch it was scored in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fine_tune.data.prepare import PrepareSpec, prepare
from fine_tune.errors import ConfigError, DataError
from fine_tune.evaluation.protocol import Subject
from fine_tune.evaluation.scored_rows import ScoredRow, logps_of, pack_items, packed_chunks, scored_rows
from fine_tune.text.template import ChatTemplate


@dataclass(frozen=True)
class LearnedRow(ScoredRow):
    """A row that knows how many of its tokens are scored."""

    @property
    def tokens(self) -> int:
        """Its learned tokens."""
        return int(self.table.supervised[self.index])


@dataclass
class Perplexity:
    """Nats per learned token over a prepared table.

    A line's ``score`` is its own nats per token. The metrics weigh rows by their tokens, and add them exactly: neither the
    order nor the packing of rows moves a digit beyond what the forward pass itself rounds.

    Attributes:
        spec: The data; conversations score their answers, documents every token.
        split: ``val`` or ``train``.
        num_items: The first so many rows; None takes all.
        micro_batch_tokens: Packed tokens of one forward pass.
        head_chunk_tokens: Rows of logits that exist at a time.
    """

    spec: PrepareSpec
    split: Literal["val", "train"] = "val"
    num_items: int | None = None
    micro_batch_tokens: int = 8192
    head_chunk_tokens: int = 1024
    name: str = "perplexity"
    compares: str | None = field(default="score", init=False)
    better: Literal["higher", "lower"] = field(default="lower", init=False)
    score_is: str = field(default="nats per token", init=False)

    def __post_init__(self) -> None:
        """Refuse a split that is none."""
        if self.split not in ("val", "train"):
            raise ConfigError(f"eval.split={self.split}: unknown. Choose one of train, val.")

    def prepare(self, tokenizer: Any, template: ChatTemplate) -> list[LearnedRow]:
        """Prepare the table, from the cache where it is known.

        Raises:
            ConfigError: The rows are preference pairs.
            DataError: There is no row.
        """
        prepared = prepare(self.spec, tokenizer, template)
        table = prepared.val if self.split == "val" else prepared.train
        if len(table) and table.branches(0):
            raise ConfigError("eval=perplexity: the data are preference pairs. Use eval=preference, or other data.")
        rows = scored_rows(table, tokenizer, limit=self.num_items)
        found = [LearnedRow(row.id, row.prompt, row.index, row.table) for row in rows]
        if not found:
            raise DataError(
                f"eval.split={self.split}: the data have no such row. Raise data.val_share, or set data.val_path."
            )
        return found

    def chunks(self, items: Sequence[ScoredRow]) -> list[list[int]]:
        """Pack rows into forward passes."""
        return packed_chunks(items, self.micro_batch_tokens)

    def score(self, subject: Subject, items: Sequence[ScoredRow], chunk: list[int]) -> list[dict[str, Any]]:
        """Score one packed pass."""
        micro = pack_items(subject, items, chunk)
        logps = logps_of(subject, micro, base=subject.base, chunk_tokens=self.head_chunk_tokens)
        lines = []
        for i, logp, tokens in zip(chunk, logps.tolist(), micro.completion_tokens.tolist(), strict=True):
            scores = {"nll": -logp, "tokens": tokens, "score": -logp / tokens}
            lines.append({"id": items[i].id, "prompt": items[i].prompt, **scores})
        return lines

    def metrics(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Divide all nats by all tokens."""
        tokens = sum(line["tokens"] for line in lines)
        # What was not finite is null in a file; one such row leaves no number for the whole.
        values = [math.nan if line["nll"] is None else line["nll"] for line in lines]
        # fsum rounds once: the sum does not depend on the order of the rows.
        nats = math.fsum(values) / tokens
        # Above this the exponential is no float any more.
        return {"nats_per_token": nats, "perplexity": math.inf if nats > 700 else math.exp(nats), "num_tokens": tokens}

    def groups(self, line: Mapping[str, Any]) -> str | None:
        """Nothing to group by."""
        return None
