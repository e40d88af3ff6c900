"""From a PrepareSpec to the tables that a run trains and validates on, through the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fine_tune.data import cache
from fine_tune.data.collect import Item, collect
from fine_tune.data.ledger import Ledger, Split
from fine_tune.data.pair_lint import Flaws, LengthBias
from fine_tune.data.prepared import EvalItem as EvalItem
from fine_tune.data.prepared import Prepared as Prepared
from fine_tune.data.spec import PrepareSpec as PrepareSpec
from fine_tune.data.spec import data_fingerprint as data_fingerprint
from fine_tune.data.table import TableBuilder, TokenTable
from fine_tune.errors import DataError, StorageError
from fine_tune.text.conversation import (
    Conversation,
    Document,
    PreferencePair,
    RowRefused,
    SourceRow,
    without_first_exchanges,
)
from fine_tune.text.encode import Encoded, Encoder
from fine_tune.text.overflow import Fit, fit, fit_pair, refuse_long_rows
from fine_tune.text.pairs import EncodedPair, encode_rows, encode_shorter
from fine_tune.text.template import ChatTemplate
from fine_tune.text.tokenizer import TextTokenizer, tokenizer_fingerprint

# Raise it whenever a change of code makes other tables from the same data: old entries are then not found.
FORMAT_VERSION = 3
ROWS_PER_CALL = 512

# Called with the stage, what is done and what is to do.
Progress = Callable[[str, int, int | None], None]


def prepare(
    spec: PrepareSpec, tokenizer: TextTokenizer, template: ChatTemplate, progress: Progress | None = None
) -> Prepared:
    """Read, split, encode and cut the rows, or take all of it from the cache.

    Raises:
        ConfigError: The spec is not valid, or template and tokenizer do not fit.
        DataError: Damaged files, more rows lost than `max_lost_share`, no training row left, or with
            `overflow=error` a row that does not fit.
        EnvironmentProblem: The Hub cannot be reached.
    """
    prepared, refusals = examine(spec, tokenizer, template, progress)
    if refusals:
        raise refusals[0]
    return prepared


def examine(
    spec: PrepareSpec, tokenizer: TextTokenizer, template: ChatTemplate, progress: Progress | None = None
) -> tuple[Prepared, list[DataError]]:
    """Prepare the rows, and return beside them what `prepare` refuses them for.

    Raises:
        ConfigError: As `prepare`.
        DataError: Damaged files.
        EnvironmentProblem: As `prepare`.
    """
    fingerprint = data_fingerprint(spec)
    key = cache.key_of(
        {
            "data": fingerprint,
            "template": template.sha256,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "version": FORMAT_VERSION,
        }
    )
    root = cache.cache_folder(spec.cache_dir)
    folder = cache.find(root, key)
    refusals: list[DataError] = []
    if folder is not None:
        prepared = Prepared.open(folder, fingerprint)
    else:
        prepared, refusals = _Builder(spec, Encoder(tokenizer, template), progress).build(fingerprint)
        # Whoever finds an entry takes it for good.
        if not refusals:
            _keep(root, key, prepared)
    prepared.eval_items = prepared.eval_items[: spec.num_eval_items]
    try:
        prepared.warnings += prepared.ledger.gate(spec.max_lost_share)
    except DataError as refused:
        refusals.append(refused)
    prepared.warnings += prepared.pair_warnings()
    # The linter of pairs has told of them.
    prepared.warnings += prepared.repeat_warnings() if spec.lint is None else []
    return prepared, refusals


def _keep(root: Path, key: str, prepared: Prepared) -> None:
    try:
        cache.store(root, key, prepared.save)
    except StorageError as error:
        # The run does not need the cache; it only has to tokenise again next time.
        prepared.warnings.append(str(error))


class _Builder:
    """Encodes the collected rows into tables and keeps the ledger."""

    def __init__(self, spec: PrepareSpec, encoder: Encoder, progress: Progress | None) -> None:
        self.spec, self.encoder = spec, encoder
        self.progress = progress or (lambda stage, done, total: None)
        self.ledger = Ledger(max_seq_len=spec.max_seq_len)
        self.lengths: list[int] = []
        self.too_long: list[tuple[str, int]] = []
        self.without_stop: list[str] = []
        self.eval_items: list[EvalItem] = []
        self.flaws = Flaws()
        # Of the training pairs, in tokens.
        self.chosen_lengths: list[int] = []
        self.rejected_lengths: list[int] = []

    def build(self, fingerprint: str) -> tuple[Prepared, list[DataError]]:
        self.progress("read", 0, None)
        train, val = collect(self.spec, self.ledger, on_flaw=self.flaws.note)
        total = len(train) + len(val)
        train_table = self._table(train, "train", 0, total)
        val_table = self._table(val, "val", len(train), total)
        self.ledger.set_lengths(self.lengths)
        self.ledger.check()
        prepared = Prepared(
            train_table, val_table, self.ledger, fingerprint, self.eval_items, self._length_bias(), self.flaws.lines()
        )
        return prepared, list(self._refusals())

    def _table(self, items: Sequence[Item], split: Split, done: int, total: int) -> TokenTable:
        builder = TableBuilder()
        for start in range(0, len(items), ROWS_PER_CALL):
            chunk = items[start : start + ROWS_PER_CALL]
            for item, encoded in zip(chunk, encode_rows(self.encoder, [item.row for item in chunk]), strict=True):
                self._settle(item, encoded, split, builder)
            self.progress("tokenize", done + start + len(chunk), total)
        return builder.build()

    def _settle(
        self, item: Item, encoded: Encoded | EncodedPair | RowRefused, split: Split, builder: TableBuilder
    ) -> None:
        """Decide on one row: into the table, or into the ledger with its reason."""
        tally = self.ledger.of(item.source, split)
        if isinstance(encoded, RowRefused):
            tally.drop(encoded.reason, item.name)
            return
        self.lengths.append(encoded.longest)
        fitted = self._fit(item.row, encoded)
        if fitted.encoded is None:
            tally.drop(str(fitted.reason), item.name, len(encoded.input_ids))
            if encoded.longest > self.spec.max_seq_len:
                self.too_long.append((item.name, encoded.longest))
            return
        kept = fitted.encoded
        tally.keep(len(kept.input_ids), kept.num_supervised, cut_tokens=fitted.cut_tokens, policy=self.spec.overflow)
        builder.add(item.name, kept)
        self._note(item.row, kept, split, is_whole=not fitted.cut_tokens)

    def _note(self, row: SourceRow, kept: Encoded | EncodedPair, split: Split, *, is_whole: bool) -> None:
        """Remember of a kept row what is told of all of them."""
        if isinstance(kept, EncodedPair) and split == "train":
            self.chosen_lengths.append(len(kept.chosen_ids))
            self.rejected_lengths.append(len(kept.rejected_ids))
        if isinstance(row, Document) or not is_whole:
            return
        if kept.num_stops < kept.num_completions:
            self.without_stop.append(row.id)
        if split == "val":
            self.eval_items.append(EvalItem.of(row))

    def _fit(self, row: SourceRow, encoded: Encoded | EncodedPair) -> Fit[Encoded] | Fit[EncodedPair]:
        max_seq_len, policy = self.spec.max_seq_len, self.spec.overflow
        if isinstance(row, PreferencePair):
            assert isinstance(encoded, EncodedPair)
            return fit_pair(
                encoded,
                max_seq_len,
                policy,
                shorten=lambda count: encode_shorter(self.encoder, row, count),
                # The linter told of them.
                keep_identical=self.spec.lint == "report" and row.chosen.strip() == row.rejected.strip(),
            )
        assert isinstance(encoded, Encoded)
        if isinstance(row, Document):
            return fit(encoded, max_seq_len, policy)
        return fit(encoded, max_seq_len, policy, shorten=lambda count: self._shorter(row, count))

    def _shorter(self, row: Conversation, count: int) -> Encoded | None:
        shorter = without_first_exchanges(row, count)
        try:
            return None if shorter is None else self.encoder.encode(shorter)
        except RowRefused:
            return None

    def _length_bias(self) -> LengthBias | None:
        return LengthBias.of(self.chosen_lengths, self.rejected_lengths) if self.chosen_lengths else None

    def _refusals(self) -> Iterator[DataError]:
        try:
            refuse_long_rows(self.too_long if self.spec.overflow == "error" else [], self.spec.max_seq_len)
        except DataError as refused:
            yield refused
        if self.without_stop:
            named = ", ".join(self.without_stop[:5])
            yield DataError(
                f"model.chat_template={self.encoder.template.name}: {len(self.without_stop)} row(s) have "
                f"an answer that does not end in the learned token {self.encoder.template.end_of_turn!r}, "
                f"for example {named}: a model trained on them would not stop. Choose another template or "
                "set model.end_of_turn."
            )
