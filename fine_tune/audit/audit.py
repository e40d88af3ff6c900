"""What a model will really see of its data: the tables of the training path, looked at row by row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich

from fine_tune.assembly import load_text, prepare_spec
from fine_tune.audit import checks
from fine_tune.audit.account import Account, take_account
from fine_tune.audit.checks import Check
from fine_tune.audit.choosing import cut_rows, dropped_rows, kept_kinds, sample
from fine_tune.audit.placing import Placed, Whole, encode_whole, is_as_encoded, place
from fine_tune.audit.prompts import Askers, asked_prompts
from fine_tune.audit.rows import Painter, Shown
from fine_tune.audit.spelling import spell
from fine_tune.data.collect import collect
from fine_tune.data.ledger import ADVICE, Ledger
from fine_tune.data.prepare import Prepared, PrepareSpec, examine
from fine_tune.errors import ConfigError, DataError, FineTuneError
from fine_tune.models.hub import context_length, resolve_model, resolve_text
from fine_tune.quiet import quiet_libraries
from fine_tune.text.conversation import Document, PreferencePair, RowRefused
from fine_tune.text.encode import Encoder


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        facts: What was looked at: label and value.
        checks: Every check with its outcome.
        account: Figures over all rows.
        ledger: What became of every row.
        rows: Rows token by token.
        frequent: The most frequent completions of the training rows: how often, in which share of them, and the text.
    """

    facts: tuple[tuple[str, str], ...]
    checks: tuple[Check, ...]
    account: Account
    ledger: Ledger
    rows: tuple[Shown, ...]
    frequent: tuple[tuple[int, float, str], ...]

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.outcome == "failed"]


def audit(cfg: Mapping[str, Any], *, number: int) -> Audit:
    """Look at the data of a checked config; no weights are loaded.

    Args:
        cfg: As for a run.
        number: Rows of each kind to show.

    Raises:
        FineTuneError: There is nothing to look at: no tokenizer, no rows, or a template that cannot be cut into turns.
    """
    quiet_libraries()
    with rich.get_console().status("reading and encoding the rows"):
        return _Auditor(cfg).look(number)


class _Auditor:
    """Everything that is looked at, read once."""

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        self.cfg = cfg
        model = cfg["model"]
        options = {"revision": model["revision"], "trust_remote_code": model["trust_remote_code"]}
        self.folder = resolve_text(model["path"], **options)
        self.tokenizer, self.template = load_text(model, self.folder)
        self.spec: PrepareSpec = prepare_spec(cfg)
        self.prepared, self.refusals = examine(self.spec, self.tokenizer, self.template)
        self.encoder = Encoder(self.tokenizer, self.template)
        self.askers = Askers(self.tokenizer, self.template)
        self.train, self.val = self._placed(self.prepared)
        self.rows = [*self.train, *self.val]

    def _placed(self, prepared: Prepared) -> tuple[list[Placed], list[Placed]]:
        train, val = collect(self.spec, Ledger(max_seq_len=self.spec.max_seq_len))
        return place(train, prepared.train, "train"), place(val, prepared.val, "val")

    def look(self, number: int) -> Audit:
        prepared, stops = self.prepared, {self.encoder.end_of_turn_id}
        if any(isinstance(row.row, Document) for row in self.rows):
            stops.add(self.tokenizer.eos_token_id)
        account = take_account(prepared.train, prepared.val, self.tokenizer, stop_ids=stops - {None})
        shown = list(self._shown(number))
        return Audit(
            facts=tuple(self._facts()),
            checks=tuple(self._checks(account, [placed for placed, _, _ in shown])),
            account=account,
            ledger=prepared.ledger,
            rows=tuple(self._painted(shown)),
            frequent=tuple(self._frequent(account)),
        )

    def _facts(self) -> Iterator[tuple[str, str]]:
        data, model, encoder = self.cfg["data"], self.cfg["model"], self.encoder
        yield "data", data["name"]
        yield (
            "read from",
            data["path"] or data["hub"] or ("several sources" if data["sources"] else "the project itself"),
        )
        yield "model", model["path"]
        yield "tokenizer", f"{type(self.tokenizer).__name__}, {len(self.tokenizer):,} tokens"
        yield "template", self.template.name
        yield "end of turn", f"{self.template.end_of_turn!r} ({encoder.end_of_turn_id})"
        yield "begin of text", f"{self.tokenizer.bos_token!r} ({self.tokenizer.bos_token_id})"
        yield "longest row", f"{self.spec.max_seq_len:,} tokens, then {self.spec.overflow}"
        yield "rows", f"{len(self.prepared.train):,} to train on, {len(self.prepared.val):,} to validate on"

    def _frequent(self, account: Account) -> Iterator[tuple[int, float, str]]:
        for count, ids in account.frequent:
            yield count, count / account.num_train_turns, "".join(spell(self.tokenizer, ids))

    def _shown(self, number: int) -> Iterator[tuple[Placed, str, Whole]]:
        """Choose rows, each with its kind and its ids before any cut."""
        chosen = list(kept_kinds(self.rows, number=number, seed=self.cfg["seed"]))
        for (kind, _), (placed, whole) in zip(chosen, encode_whole([p for _, p in chosen], self.encoder), strict=True):
            yield placed, kind, whole
        if self.prepared.ledger.total.cut:
            limit = self.spec.max_seq_len
            for placed, whole in cut_rows(self.rows, self.encoder, number=number, max_seq_len=limit):
                yield placed, f"cut by {self.spec.overflow}", whole
        for reason, name, found in dropped_rows(self.rows, self.prepared.ledger, number=number):
            kind = f"dropped: {reason}"
            if found is None:
                nowhere = Placed(Document("", id=name, group=""), "", "", self.prepared.train, None)
                yield nowhere, kind, RowRefused(reason, "turned away before it was encoded")
            else:
                [(placed, whole)] = encode_whole([found], self.encoder)
                yield placed, kind, whole

    def _painted(self, shown: Sequence[tuple[Placed, str, Whole]]) -> Iterator[Shown]:
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        painter = Painter(self.tokenizer, special={*special, self.encoder.end_of_turn_id})
        for placed, kind, whole in shown:
            compared = self._is_whole(placed, whole) and asked_prompts(placed.row)
            differences = self.askers.differences([placed])[0] if compared else None
            yield painter.show(placed, whole, kind=kind, differences=differences)

    def _is_whole(self, placed: Placed, whole: Whole) -> bool:
        fits = not isinstance(whole, RowRefused) and whole.longest <= self.spec.max_seq_len
        return placed.index is not None and fits

    def _checks(self, account: Account, shown: Sequence[Placed]) -> Iterator[Check]:
        yield from self._data_checks()
        yield from checks.account_checks(account, self.tokenizer, stop=self.template.end_of_turn)
        yield from self._row_checks(shown)
        positions = context_length(self.folder) if (self.folder / "config.json").is_file() else None
        yield checks.length_check(self.spec.max_seq_len, positions)
        if positions is not None and self.prepared.eval_items:
            room = max(1, positions - self.cfg["data"]["max_new_tokens"])
            lengths = [len(self.encoder.encode_prompt(item.messages)) for item in self.prepared.eval_items]
            yield checks.room_check(sum(length > room for length in lengths), room)
        yield checks.own_template_check(self.template, self.tokenizer)
        yield from self._model_check()

    def _data_checks(self) -> Iterator[Check]:
        for refused in self.refusals:
            yield Check("rows", "failed", str(refused))
        if not self.refusals:
            lost = f"{self.prepared.ledger.lost_share:.1%} of the rows are lost; data.max_lost_share={self.spec.max_lost_share}"
            yield Check("rows", "passed", f"{lost}.")
        for warning in self.prepared.warnings:
            yield Check("rows", "look", warning)

    def _row_checks(self, shown: Sequence[Placed]) -> Iterator[Check]:
        """Encode a sample and the shown rows anew, and compare them with the tables and with what is asked."""
        kept = len(self.prepared.train) + len(self.prepared.val)
        drawn = {id(row): row for row in [*sample(self.rows, seed=self.cfg["seed"]), *shown] if row.index is not None}
        encoded = [
            (row, whole)
            for row, whole in encode_whole(list(drawn.values()), self.encoder)
            if self._is_whole(row, whole)
        ]
        different = [row.row.id for row, whole in encoded if not is_as_encoded(row, whole)]
        yield checks.table_check(different, len(encoded), kept - sum(row.index is not None for row in self.rows))
        whole_rows = [row for row, _ in encoded if not isinstance(row.row, Document)]
        found = list(zip([row.row.id for row in whole_rows], self.askers.differences(whole_rows), strict=True))
        prompts = sum(len(asked_prompts(row.row)) for row in whole_rows)
        if any(not isinstance(row.row, Document) for row in self.rows):
            yield checks.prompts_check(found, prompts, list(self.askers.encoders))
        pairs = [row for row in whole_rows if isinstance(row.row, PreferencePair)]
        if pairs:
            yield checks.sides_check([row.row.id for row in pairs if not self._sides_are_talks(row)], len(pairs))

    def _sides_are_talks(self, placed: Placed) -> bool:
        assert isinstance(placed.row, PreferencePair)
        assert placed.index is not None
        ids = placed.table.row(placed.index)[0].tolist()
        first, second = placed.table.branches(placed.index)
        talks = [placed.row.conversation(side) for side in (placed.row.chosen, placed.row.rejected)]
        chosen, rejected = self.encoder.encode_many(talks)
        if isinstance(chosen, RowRefused) or isinstance(rejected, RowRefused):
            return False
        return [chosen.input_ids, rejected.input_ids] == [ids[:second], ids[:first] + ids[second:]]

    def _model_check(self) -> Iterator[Check]:
        """A folder without weights is enough here; say what training would not take."""
        model = self.cfg["model"]
        if not Path(model["path"]).expanduser().is_dir():
            return
        try:
            resolve_model(model["path"], trust_remote_code=model["trust_remote_code"])
        except FineTuneError as refused:
            why = refused.problems[0] if isinstance(refused, ConfigError) else str(refused)
            yield Check("the model's folder", "look", f"training would refuse it. {why}")


def refuse(found: Audit) -> None:
    """Turn failed checks into an error.

    Raises:
        DataError: There is one.
    """
    if found.failed:
        lines = "\n".join(f"  - {check.name}: {check.says}" for check in found.failed)
        raise DataError(f"audit: {len(found.failed)} of {len(found.checks)} checks failed:\n{lines}")


def advice(row: Shown) -> str:
    """What to do about a dropped row."""
    reason = row.kind.removeprefix("dropped: ")
    return ADVICE.get(reason, "") if reason != row.kind else ""
