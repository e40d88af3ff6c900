"""What became of every row and token: kept, cut or dropped, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from fine_tune.errors import DataError
from fine_tune.visible import visible

Split = Literal["train", "val", "unsplit"]
MAX_EXAMPLES = 5
PERCENTILES = (50, 90, 95, 99, 100)
MAX_BINS = 40
# Reasons for leaving a row out that the data or the config asks for. They count as dropped, but not as lost.
BY_DESIGN = frozenset(
    {
        "deleted",
        "below_deleted",
        "other_language",
        "below_other_language",
        "other_reply",
        "unanswered_prompt",
        "unranked",
        "equal_rank",
        "other_pair",
        "weight",
        "max_examples",
        "max_val_examples",
        # Flaws of preference pairs that data.lint leaves out.
        "identical_pair",
        "tie",
        "duplicate",
        "conflicting_pair",
    }
)
ADVICE = {
    "too_long": "raise data.max_seq_len, or choose data.overflow=truncate_prompt, truncate_completion or "
    "keep_last_turns",
    "completion_too_long": "raise data.max_seq_len, or set data.overflow=truncate_completion",
    "no_supervised_tokens": "raise data.max_seq_len, or set data.overflow=truncate_prompt: prompts are long",
    "cut_to_identical": "raise data.max_seq_len, or choose another data.overflow: the sides differ behind the cut",
    "template_mismatch": "choose a model.chat_template that takes these turns",
    "missing_field": "check data.format and data.options against the fields of the file",
    "no_turns": "check data.format: the rows are not in this form",
    "differing_prompts": "check that both sides answer the same prompt, and which fields data.options names",
    "empty_side": "check which fields data.options names for the two answers",
    "in_validation": "remove from data.val_path what is trained on",
}


@dataclass
class TokenCount:
    """Tokens of the rows that were encoded: `read == kept + cut + dropped`; `supervised` of the kept ones."""

    read: int = 0
    kept: int = 0
    cut: int = 0
    dropped: int = 0
    supervised: int = 0


@dataclass
class Tally:
    """The account of one source and split.

    Attributes:
        read: Rows handed out or rejected by the reader. For `oasst1` a row is a thread handed out or a
            message left out; a copy of a row in a mix counts as a row.
        kept: Rows in the table.
        dropped: Rows by reason.
        cut: Kept rows that lost tokens, by overflow policy.
        tokens: See `TokenCount`.
        examples: Ids of the first rows of each reason.
    """

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    tokens: TokenCount = field(default_factory=TokenCount)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def keep(self, num_tokens: int, num_supervised: int, *, cut_tokens: int = 0, policy: str = "") -> None:
        """Count a row that goes into the table with `num_tokens` tokens."""
        self.read += 1
        self.kept += 1
        if cut_tokens:
            self.cut[policy] += 1
        self.tokens.read += num_tokens + cut_tokens
        self.tokens.kept += num_tokens
        self.tokens.cut += cut_tokens
        self.tokens.supervised += num_supervised

    def drop(self, reason: str, row_id: str, num_tokens: int = 0) -> None:
        """Count a row that is left out; `num_tokens` is 0 for one that was never encoded."""
        self.read += 1
        self.dropped[reason] += 1
        self.tokens.read += num_tokens
        self.tokens.dropped += num_tokens
        named = self.examples.setdefault(reason, [])
        if len(named) < MAX_EXAMPLES:
            named.append(row_id)


class Ledger:
    """The account of a data set, per source and split.

    Rows that a reader rejects have no split yet and are counted under `unsplit`.

    Example:
        >>> ledger = Ledger(max_seq_len=8)
        >>> ledger.of("chat", "train").keep(6, 2)
        >>> ledger.of("chat", "train").drop("too_long", "rows.jsonl:2", 20)
        >>> ledger.check()
        >>> ledger.lost_share
        0.5
    """

    def __init__(self, *, max_seq_len: int) -> None:
        """Start empty; `max_seq_len` is told with the verdict."""
        self.max_seq_len = max_seq_len
        self.tallies: dict[tuple[str, Split], Tally] = {}
        self.length_percentiles: dict[str, int] = {}
        self.length_histogram: dict[str, list[int]] = {}

    def of(self, source: str, split: Split) -> Tally:
        """The tally of a source and split, made on first use."""
        return self.tallies.setdefault((source, split), Tally())

    def set_lengths(self, lengths: Iterable[int]) -> None:
        """Keep percentiles and a histogram of the rows' lengths in tokens before any cut."""
        values = np.fromiter(lengths, dtype=np.int64)
        if values.size:
            found = np.percentile(values, PERCENTILES, method="inverted_cdf")
            self.length_percentiles = {f"p{p}": int(v) for p, v in zip(PERCENTILES, found, strict=True)}
            self.length_histogram = _histogram(values)

    @property
    def total(self) -> Tally:
        """The sum over sources and splits."""
        return _sum(self.tallies.values())

    @property
    def lost_share(self) -> float:
        """Dropped rows over rows read, those left out by design excluded from both."""
        total = self.total
        by_design = sum(count for reason, count in total.dropped.items() if reason in BY_DESIGN)
        considered = total.read - by_design
        return (total.dropped.total() - by_design) / considered if considered else 0.0

    def check(self) -> None:
        """Assert that every row and token is accounted for; a failure is a bug of ours."""
        for key, tally in self.tallies.items():
            assert tally.kept + tally.dropped.total() == tally.read, (key, tally)
            count = tally.tokens
            assert count.kept + count.cut + count.dropped == count.read, (key, count)

    def gate(self, max_lost_share: float) -> list[str]:
        """Refuse a data set that lost too many rows, and return warnings about tokens that were cut.

        Raises:
            DataError: More than `max_lost_share` of the rows are lost, or no training row is left.
        """
        self.check()
        kept = _sum(tally for (_, split), tally in self.tallies.items() if split == "train").kept
        if kept == 0 or self.lost_share > max_lost_share:
            raise DataError(self._verdict(max_lost_share, any_left=kept > 0))
        total = self.total
        if not total.tokens.cut:
            return []
        share = total.tokens.cut / total.tokens.read
        return [
            f"{total.tokens.cut:,} of {total.tokens.read:,} tokens ({share:.1%}) of {total.cut.total():,} "
            f"rows were cut by data.overflow={', '.join(sorted(total.cut))}: they exceed "
            f"data.max_seq_len={self.max_seq_len}."
        ]

    def _verdict(self, max_lost_share: float, *, any_left: bool) -> str:
        total = self.total
        lost = {reason: count for reason, count in total.dropped.most_common() if reason not in BY_DESIGN}
        considered = total.read - total.dropped.total() + sum(lost.values())
        head = (
            f"data.max_lost_share={max_lost_share}: {sum(lost.values()):,} of {considered:,} rows "
            f"({self.lost_share:.1%}) would be lost."
            if any_left
            else f"no training row is left of {total.read:,} rows read."
        )
        lines = [head]
        for reason, count in (lost if any_left else total.dropped).items():
            named = ", ".join(self._examples(reason))
            lines.append(f"  {count:>8,}  {reason:<24} for example {named}")
        lengths = ", ".join(f"{name} {value:,}" for name, value in self.length_percentiles.items())
        lines.append(
            f"  data.max_seq_len={self.max_seq_len}; lengths in tokens: {lengths or 'no row was encoded'}"
        )
        advice = [f"{reason}: {ADVICE[reason]}" for reason in lost if reason in ADVICE]
        lines += [f"  {line}." for line in advice]
        if any_left:
            lines.append(f"  Or accept the loss with data.max_lost_share={_rounded_up(self.lost_share)}.")
        return "\n".join(lines)

    def _examples(self, reason: str) -> list[str]:
        found = [row for tally in self.tallies.values() for row in tally.examples.get(reason, ())]
        return found[:MAX_EXAMPLES]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for data_ledger.json: the total first, then each source and split."""
        return {
            **_plain(self.total),
            "lost_share": self.lost_share,
            "max_seq_len": self.max_seq_len,
            "length_percentiles": self.length_percentiles,
            "length_histogram": self.length_histogram,
            "parts": [{"source": s, "split": p, **_plain(tally)} for (s, p), tally in self.tallies.items()],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Ledger:
        """Read back what `as_dict` wrote."""
        ledger = cls(max_seq_len=values["max_seq_len"])
        ledger.length_percentiles = dict(values["length_percentiles"])
        # Tables that were cached before there was one have none.
        ledger.length_histogram = dict(values.get("length_histogram", {}))
        for part in values["parts"]:
            known = {name.name: part[name.name] for name in fields(Tally)}
            known["dropped"], known["cut"] = Counter(known["dropped"]), Counter(known["cut"])
            known["tokens"] = TokenCount(**known["tokens"])
            ledger.tallies[part["source"], part["split"]] = Tally(**known)
        return ledger

    def render(self) -> Table:
        """A table for the terminal: one line per source and split, and below it one per reason of what was dropped."""
        # Narrow enough for 80 columns: a reason or a count that is cut off says nothing.
        table = Table(title="data", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("source", overflow="fold")
        table.add_column("split, reason", no_wrap=True)
        for name in ("read", "kept", "cut", "dropped", "tokens", "learned"):
            table.add_column(name, justify="right", no_wrap=True)
        for (source, split), tally in self.tallies.items():
            counts = (tally.read, tally.kept, tally.cut.total(), tally.dropped.total())
            tokens = (_brief(tally.tokens.kept), _brief(tally.tokens.supervised))
            table.add_row(escape(visible(source)), split, *(f"{n:,}" for n in counts), *tokens)
            for reason, count in tally.dropped.most_common():
                table.add_row("", f"  {escape(visible(reason))}", "", "", "", f"{count:,}", "", "", style="dim")
        return table


def _brief(tokens: int) -> str:
    """Millions from ten on; data_ledger.json has every digit."""
    return f"{tokens:,}" if tokens < 10_000_000 else f"{tokens / 1e6:,.1f} M"


def _plain(tally: Tally) -> dict[str, Any]:
    values = asdict(tally)
    return {**values, "dropped": dict(tally.dropped), "cut": dict(tally.cut)}


def _sum(tallies: Iterable[Tally]) -> Tally:
    total = Tally()
    for tally in tallies:
        total.read += tally.read
        total.kept += tally.kept
        total.dropped += tally.dropped
        total.cut += tally.cut
        for name in vars(total.tokens):
            setattr(total.tokens, name, getattr(total.tokens, name) + getattr(tally.tokens, name))
        for reason, ids in tally.examples.items():
            total.examples[reason] = (total.examples.get(reason, []) + ids)[:MAX_EXAMPLES]
    return total


def _rounded_up(share: float) -> float:
    return min(1.0, (int(share * 100) + 1) / 100)


def _histogram(lengths: np.ndarray) -> dict[str, list[int]]:
    """Count rows between whole edges of equal distance; a row as long as an edge belongs to the bin that starts there."""
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // MAX_BINS)
    edges = list(range(low, high + 1, width))
    counts = np.bincount((lengths - low) // width, minlength=len(edges))
    return {"edges": [*edges, edges[-1] + width], "counts": [int(count) for count in counts]}
