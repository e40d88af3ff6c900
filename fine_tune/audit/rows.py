"""Rows token by token: what is learned, what is only read, and what was cut."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from fine_tune.audit.placing import Placed, Whole
from fine_tune.audit.spelling import spell
from fine_tune.text.conversation import RowRefused
from fine_tune.text.pairs import EncodedPair

State = Literal["learned", "masked", "cut"]


class Token(NamedTuple):
    """One token: the text it adds, its id, what became of it, and whether it is one of the tokenizer's special ones."""

    text: str
    id: int
    state: State
    special: bool


class Part(NamedTuple):
    """A stretch of a row with a name of its own; a conversation is one without a name."""

    title: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Shown:
    """A row as it is shown.

    Attributes:
        name: Its id.
        source: Where it is from.
        split: ``train`` or ``val``.
        kind: Why it is shown: ``longest``, ``cut``, ``dropped: too_long``, ...
        parts: Its tokens; none where it could not be encoded.
        num_tokens: Tokens that are kept.
        num_learned: Learned ones of them.
        num_cut: Tokens that are not kept.
        note: What there is to say of it.
        differences: Where it is asked for in other ids than it is learned after; None where that is not compared.
    """

    name: str
    source: str
    split: str
    kind: str
    parts: tuple[Part, ...] = ()
    num_tokens: int = 0
    num_learned: int = 0
    num_cut: int = 0
    note: str = ""
    differences: tuple[str, ...] | None = None


class Painter:
    """Makes tokens of ids."""

    def __init__(self, tokenizer: Any, *, special: Collection[int]) -> None:
        self.tokenizer, self.special = tokenizer, frozenset(special)

    def show(self, placed: Placed, whole: Whole, *, kind: str, differences: Sequence[str] | None = None) -> Shown:
        """Show a row, kept or dropped."""
        head: dict[str, Any] = {"name": placed.row.id, "source": placed.source, "split": placed.split, "kind": kind}
        if isinstance(whole, RowRefused):
            return Shown(**head, note=str(whole))
        parts = tuple(Part(title, tuple(tokens)) for title, tokens in self._parts(placed, whole))
        states = [token.state for part in parts for token in part.tokens]
        return Shown(
            **head,
            parts=parts,
            num_tokens=len(states) - states.count("cut"),
            num_learned=states.count("learned"),
            num_cut=states.count("cut"),
            differences=None if differences is None else tuple(differences),
        )

    def _parts(self, placed: Placed, whole: Whole) -> list[tuple[str, list[Token]]]:
        assert not isinstance(whole, RowRefused)
        ids, mask, borders = _kept(placed)
        if not isinstance(whole, EncodedPair):
            return [("", self._tokens([], lay_out(whole.input_ids, ids, mask)))]
        first, second = borders or (0, 0)
        prompt = lay_out(whole.prompt_ids, ids[:first], mask[:first])
        chosen = lay_out(whole.chosen_ids, ids[first:second], mask[first:second])
        rejected = lay_out(whole.rejected_ids, ids[second:], mask[second:])
        before = [token for token, _ in prompt]
        return [
            ("prompt", self._tokens([], prompt)),
            ("chosen", self._tokens(before, chosen)),
            ("rejected", self._tokens(before, rejected)),
        ]

    def _tokens(self, before: Sequence[int], laid: Sequence[tuple[int, State]]) -> list[Token]:
        """Spell ids as what they are behind others."""
        texts = spell(self.tokenizer, [*before, *(token for token, _ in laid)])[len(before) :]
        return [
            Token(text, token, state, token in self.special) for text, (token, state) in zip(texts, laid, strict=True)
        ]


def _kept(placed: Placed) -> tuple[list[int], list[bool], tuple[int, ...]]:
    if placed.index is None:
        return [], [], ()
    ids, mask = placed.table.row(placed.index)
    return ids.tolist(), mask.tolist(), placed.table.branches(placed.index)


def lay_out(whole: Sequence[int], kept: Sequence[int], mask: Sequence[bool]) -> list[tuple[int, State]]:
    """Put back the tokens that were cut out of ids, each with its state.

    Tokens are cut from the end or from one place further ahead; what was written anew behind such a cut stands after it.
    """
    both = min(len(kept), len(whole))
    ahead = both if list(whole[:both]) == list(kept[:both]) else 0
    behind = 0
    while not ahead and behind < both and whole[-1 - behind] == kept[-1 - behind]:
        behind += 1
    while ahead < both - behind and whole[ahead] == kept[ahead]:
        ahead += 1
    laid: list[tuple[int, State]] = [
        (token, "learned" if on else "masked") for token, on in zip(kept, mask, strict=True)
    ]
    cut: list[tuple[int, State]] = [(token, "cut") for token in whole[ahead : len(whole) - behind]]
    return laid[:ahead] + cut + laid[ahead:]
