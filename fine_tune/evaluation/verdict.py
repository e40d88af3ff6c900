"""Better, worse, or cannot tell: two models on identical items, with the evidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from rich.table import Table
from rich.text import Text

from fine_tune.errors import DataError
from fine_tune.evaluation.paired import (
    LEVEL,
    POWER,
    Numbers,
    bootstrap_interval,
    holm,
    items_for_flips,
    items_for_mean,
    mcnemar,
    sign_flip,
)
from fine_tune.evaluation.same_items import Line, check_same_items, is_binary
from fine_tune.visible import blanked

Word = Literal["better", "worse", "cannot tell"]


@dataclass(frozen=True)
class Group:
    """One group of items, tested by itself; ``word`` follows the p adjusted over all groups."""

    name: str
    num_items: int
    mean_a: float
    mean_b: float
    num_gained: int
    num_lost: int
    p: float
    adjusted_p: float
    word: Word


@dataclass(frozen=True)
class Verdict:
    """What the items say about the second model (b) against the first (a).

    ``mean_*``, ``difference`` (b minus a) and ``interval`` are in the units of the field; for true/false fields they
    are shares. ``num_gained`` counts the items on which b is better, ``num_lost`` those on which it is worse. The ids
    are kept for true/false fields only: those are the flips. ``more_items`` is None where it cannot be estimated.
    ``called`` is what the sentence calls a score; the field's own name where it is empty.
    """

    word: Word
    field: str
    higher_is_better: bool
    binary: bool
    num_items: int
    mean_a: float
    mean_b: float
    difference: float
    interval: tuple[float, float] | None
    p: float
    num_gained: int
    num_lost: int
    gained: tuple[str, ...]
    lost: tuple[str, ...]
    more_items: int | None
    groups: tuple[Group, ...] = ()
    names: tuple[str, str] = ("the first", "the second")
    called: str = ""

    def named(self, a: str, b: str) -> Verdict:
        """Return the verdict with the models' names in its sentence and table."""
        return replace(self, names=(a, b))

    def calling(self, score: str) -> Verdict:
        """Return the verdict with words for what is compared in its sentence: a line's ``score`` says nothing by itself."""
        return replace(self, called=score)

    @property
    def sentence(self) -> str:
        """The verdict in one plain sentence, without control characters."""
        seen = _flips_seen(self) if self.binary else _scores_seen(self)
        if self.word != "cannot tell":
            return f"{self.word}: {seen}"
        return f"cannot tell with {_count(self.num_items, 'item')}: {seen}; {_wanted(self)}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, the sentence included."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {"sentence": self.sentence, **plain}


def compare(
    lines_a: Sequence[Line],
    lines_b: Sequence[Line],
    *,
    field: str,
    better: str,
    group_of: Callable[[Any], str | None] | None = None,
    seed: int = 0,
) -> Verdict:
    """Decide whether the second model is better than the first on the same items.

    True/false fields are tested by exact McNemar. Scores are told apart only if the bootstrap interval of the mean
    difference excludes zero and the sign-flip test agrees: the interval alone is too narrow on a handful of items.

    Args:
        lines_a: Lines of the first model, one per item, in item order.
        lines_b: Lines of the second model, for the same items in the same order.
        field: Key of the value that is compared; all of its values are true/false or all are numbers.
        better: ``higher`` or ``lower``.
        group_of: Group of a line (None: in no group). Groups are tested one by one, Holm-adjusted.
        seed: Of the resampling.

    Raises:
        DataError: The items differ (the first difference is named), or a value is missing or not finite.
        ValueError: ``better`` is neither of its two words.

    Example:
        >>> a = [{"id": str(i), "prompt": "?", "correct": False} for i in range(6)]
        >>> b = [{**line, "correct": True} for line in a]
        >>> compare(a, b, field="correct", better="higher").named("base", "sft").sentence
        'better: sft answers 6 more of 6 items right than base (6 gained, 0 lost; exact McNemar p = 0.031)'
    """
    if better not in ("higher", "lower"):
        raise ValueError(f"better={better!r}: must be 'higher' or 'lower'.")
    check_same_items(lines_a, lines_b)
    binary = is_binary(lines_a, lines_b, field)
    a, b = _values(lines_a, field), _values(lines_b, field)
    gain = b - a if better == "higher" else a - b
    interval = bootstrap_interval(b - a, seed=seed)
    p = _p_value(gain, binary, seed)
    up, down = int((gain > 0).sum()), int((gain < 0).sum())
    word = _word(gain, p)
    if not binary and interval is not None and interval[0] <= 0 <= interval[1]:
        word = "cannot tell"
    ids = [str(line["id"]) for line in lines_a] if binary else []
    return Verdict(
        word=word,
        field=field,
        higher_is_better=better == "higher",
        binary=binary,
        num_items=len(gain),
        mean_a=_mean(a),
        mean_b=_mean(b),
        difference=_mean(b - a),
        interval=interval,
        p=p,
        num_gained=up,
        num_lost=down,
        gained=tuple(name for name, change in zip(ids, gain, strict=False) if change > 0),
        lost=tuple(name for name, change in zip(ids, gain, strict=False) if change < 0),
        more_items=_more_items(gain, binary) if word == "cannot tell" else None,
        groups=_groups(_group_names(lines_a, lines_b, group_of), (a, b, gain), binary, seed),
    )


def verdict_table(verdict: Verdict) -> Table:
    """Lay the verdict and its groups out for the terminal; names appear as text, never as markup."""
    table = Table(title=Text(verdict.sentence), title_justify="left", expand=False)
    table.add_column("group", overflow="fold")
    for name in ("items", *verdict.names, "gained", "lost", "p", "Holm p"):
        table.add_column(Text(blanked(name)), justify="right")
    table.add_column("verdict")
    everything = Group(
        "all", verdict.num_items, verdict.mean_a, verdict.mean_b, verdict.num_gained, verdict.num_lost,
        verdict.p, verdict.p, verdict.word,
    )  # fmt: skip
    for row in (everything, *verdict.groups):
        means = [f"{100 * x:.1f} %" if verdict.binary else f"{x:.4g}" for x in (row.mean_a, row.mean_b)]
        adjusted = "" if row is everything else _short(row.adjusted_p)
        counts = [f"{count:,}" for count in (row.num_gained, row.num_lost)]
        cells = [f"{row.num_items:,}", *means, *counts, _short(row.p), adjusted, row.word]
        table.add_row(Text(blanked(row.name)), *cells, end_section=row is everything)
    return table


def _values(lines: Sequence[Line], field: str) -> Numbers:
    return np.array([float(line[field]) for line in lines], dtype=np.float64)


def _p_value(gain: Numbers, binary: bool, seed: int | Sequence[int]) -> float:
    if binary:
        return mcnemar(int((gain > 0).sum()), int((gain < 0).sum()))
    return sign_flip(gain, seed=seed)


def _word(gain: Numbers, p: float) -> Word:
    if p > LEVEL:
        return "cannot tell"
    return "better" if gain.sum() > 0 else "worse"


def _more_items(gain: Numbers, binary: bool) -> int | None:
    needed = items_for_mean(gain)
    if binary and len(gain):
        needed = items_for_flips(int((gain > 0).sum()), int((gain < 0).sum()), len(gain))
    return None if needed is None else max(1, needed - len(gain))


def _mean(values: Numbers) -> float:
    return float(values.mean()) if len(values) else 0.0


def _group_names(
    lines_a: Sequence[Line], lines_b: Sequence[Line], group_of: Callable[[Any], str | None] | None
) -> list[str | None]:
    """Name every item's group, which must not depend on what a model answered."""
    if group_of is None:
        return [None] * len(lines_a)
    names = [group_of(line) for line in lines_a]
    for line, one, two in zip(lines_a, names, map(group_of, lines_b), strict=True):
        if one != two:
            raise DataError(
                f"item {line['id']!a} is in group {one!a} in the first evaluation and in {two!a} in the second: "
                "a group must follow from the item alone. Evaluate both models anew on the same items."
            )
    return names


def _groups(
    names: list[str | None], values: tuple[Numbers, Numbers, Numbers], binary: bool, seed: int
) -> tuple[Group, ...]:
    """Test each group by itself, in order of first appearance."""
    found = []
    members: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        if name is not None:
            members.setdefault(name, []).append(index)
    parts = [[value[rows] for value in values] for rows in members.values()]
    p_values = [_p_value(gain, binary, (seed, number)) for number, (_, _, gain) in enumerate(parts, start=1)]
    for name, (a, b, gain), p, adjusted in zip(members, parts, p_values, holm(p_values), strict=True):
        up, down = int((gain > 0).sum()), int((gain < 0).sum())
        found.append(Group(name, len(gain), _mean(a), _mean(b), up, down, p, adjusted, _word(gain, adjusted)))
    return tuple(found)


def _flips_seen(verdict: Verdict) -> str:
    one, two = map(blanked, verdict.names)
    change = round(verdict.difference * verdict.num_items)
    amount = f"{abs(change):,} {'more' if change > 0 else 'fewer'} of" if change else "as many of"
    right = ("answers", " right") if verdict.field == "correct" else (f"has {blanked(verdict.field)} in", "")
    than = "than" if change else "as"
    evidence = f"({verdict.num_gained} gained, {verdict.num_lost} lost; exact McNemar p = {_short(verdict.p)})"
    return f"{two} {right[0]} {amount} {_count(verdict.num_items, 'item')}{right[1]} {than} {one} {evidence}"


def _scores_seen(verdict: Verdict) -> str:
    one, two = map(blanked, verdict.names)
    change = verdict.difference
    amount = f"{abs(change):.3g} {'higher' if change > 0 else 'lower'} than" if change else "the same as"
    ends = verdict.interval
    spread = f"{100 * (1 - LEVEL):.0f} % interval {ends[0]:.3g} to {ends[1]:.3g}, " if ends else ""
    evidence = f"({spread}sign-flip p = {_short(verdict.p)})"
    over = f"over {_count(verdict.num_items, 'item')} " if verdict.word != "cannot tell" else ""
    return f"mean {blanked(verdict.called or verdict.field)} of {two} is {amount} that of {one} {over}{evidence}"


def _wanted(verdict: Verdict) -> str:
    """Say how many more items would decide."""
    if verdict.more_items is None:
        return "this leaves nothing to estimate from how many more would be needed"
    digits = max(0, len(str(verdict.more_items)) - 2)
    about = math.ceil(verdict.more_items / 10**digits) * 10**digits
    return f"about {about:,} more would be needed to find such a difference {100 * POWER:.0f} % of the time"


def _short(p: float) -> str:
    return f"{p:.2g}" if p >= 1e-4 else f"{p:.0e}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
