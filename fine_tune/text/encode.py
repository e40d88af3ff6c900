"""Conversation to token ids and loss mask: the only place that calls a tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from fine_tune.errors import ConfigError
from fine_tune.text.conversation import Conversation, Document, Message, RowRefused, check_trainable
from fine_tune.text.spans import Span, SpanEncoder, alternatives
from fine_tune.text.template import ChatTemplate, Piece
from fine_tune.text.tokenizer import TextTokenizer, unknown_ids

# Private-use planes: one character stands for one special-token string while a template renders.
MARKER_BASES = (0xF0000, 0x100000)
# Text that a tokenizer drops leaves its blanks and the end of turn; a piece of more kinds of tokens is not looked at.
FEW_TOKENS = 4


@dataclass(slots=True)
class Encoded:
    """Token ids of one row.

    Attributes:
        input_ids: Up to the last supervised token: what follows it cannot influence the loss.
        loss_mask: True where a token is learned. Position 0 never is: nothing predicts it.
        turn_starts: Index of the first token of each assistant completion.
        turn_ends: Index behind its end-of-turn token.
        has_bos: The first token is the BOS token.
        num_stops: Completions whose last supervised token is the end-of-turn token.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    turn_starts: list[int] = field(default_factory=list)
    turn_ends: list[int] = field(default_factory=list)
    has_bos: bool = False
    num_stops: int = 0

    @property
    def num_supervised(self) -> int:
        """Learned tokens."""
        return sum(self.loss_mask)

    @property
    def num_completions(self) -> int:
        """Assistant turns; a document counts as one."""
        return len(self.turn_starts)

    @property
    def longest(self) -> int:
        """What `data.max_seq_len` bounds: all tokens."""
        return len(self.input_ids)

    @property
    def branches(self) -> tuple[int, ...]:
        """None: see `EncodedPair`."""
        return ()


class Encoder:
    """Encodes many rows with one tokenizer and template.

    Pieces of a render are encoded separately and their ids laid end to end, so a mask is a matter of
    position. Special-token strings in the messages stay ordinary text; those of the template are special.

    Attributes:
        end_of_turn_id: The token that ends an assistant turn.

    Raises:
        ConfigError: The template's end-of-turn text is not one token of this tokenizer, or one that it does not know.
    """

    def __init__(self, tokenizer: TextTokenizer, template: ChatTemplate) -> None:
        """Find out how the tokenizer begins a text and whether the turn ends in one token."""
        self.tokenizer, self.template = tokenizer, template
        self._spans = SpanEncoder(tokenizer)
        self._special = dict(self._spans.special)
        stop = self._spans.added.get(template.end_of_turn)
        # A tokenizer may not find an added token that is not special inside a text (one with a normalizer
        # does not): such an end of turn is then cut out and given its id by us.
        self._cut_out_stop = stop is not None and template.end_of_turn not in self._special
        if self._cut_out_stop:
            self._special[template.end_of_turn] = stop
        self._special_pattern = alternatives(self._special)
        self._protected = sorted({*self._special, template.end_of_turn})
        self._protected_pattern = alternatives(self._protected)
        self.end_of_turn_id = self._find_end_of_turn()

    def encode(self, row: Conversation | Document) -> Encoded:
        """Encode one row.

        Raises:
            RowRefused: There is nothing to learn in it, or the template cannot be cut into its turns.
        """
        result = self.encode_many([row])[0]
        if isinstance(result, RowRefused):
            raise result
        return result

    def encode_many(self, rows: Sequence[Conversation | Document]) -> list[Encoded | RowRefused]:
        """Encode rows with two tokenizer calls in all; a refused row is returned as its exception."""
        plans: list[list[tuple[list[Span], bool]] | RowRefused] = []
        for row in rows:
            try:
                check_trainable(row)
                plans.append(
                    self._plan_document(row) if isinstance(row, Document) else self._plan(row.messages)
                )
            except RowRefused as refused:
                plans.append(refused)
        spans = [span for plan in plans if isinstance(plan, list) for parts, _ in plan for span in parts]
        ids = iter(self._spans.encode(spans))
        results: list[Encoded | RowRefused] = []
        for row, plan in zip(rows, plans, strict=True):
            if isinstance(plan, RowRefused):
                results.append(plan)
                continue
            joined = [([i for _ in parts for i in next(ids)], supervised) for parts, supervised in plan]
            texts = ["".join(span.text for span in parts) for parts, _ in plan]
            if any(supervised and self._is_lost(text, found) for text, (found, supervised) in zip(texts, joined, strict=True)):
                name = type(self.tokenizer).__name__
                results.append(RowRefused("text_without_tokens", f"{name} gives no token for what is to be learned"))
                continue
            results.append(self._assemble(joined, is_document=isinstance(row, Document)))
        return results

    def _is_lost(self, text: str, ids: Sequence[int]) -> bool:
        """A tokenizer without an unknown token drops what it has no words for, and says nothing: only blanks are left."""
        if len(set(ids)) > FEW_TOKENS or not text.replace(self.template.end_of_turn, "").strip():
            return False
        left = [i for i in ids if i != self.end_of_turn_id]
        return not left or not self.tokenizer.decode(left).strip()

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a generation prompt: the same ids that training sees before the answer.

        Raises:
            RowRefused: The template cannot be cut into these turns.
        """
        spans = [span for parts, _ in self._plan(messages, add_generation_prompt=True) for span in parts]
        return [i for ids in self._spans.encode(spans) for i in ids]

    def _plan(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> list[tuple[list[Span], bool]]:
        markers: dict[str, str] = {}
        if any(self._protected_pattern.search(message.content) for message in messages):
            markers = self._markers(messages)
            messages = [Message(m.role, self._hide(m.content, markers)) for m in messages]
        pieces = self.template.pieces(messages, add_generation_prompt)
        before = ""
        plan = []
        for piece in pieces:
            plan.append((self._piece_spans(piece, before, markers), piece.supervised))
            before = piece.text
        return plan

    def _hide(self, content: str, markers: dict[str, str]) -> str:
        by_text = {text: marker for marker, text in markers.items()}
        return self._protected_pattern.sub(lambda found: by_text[found.group()], content)

    def _markers(self, messages: Sequence[Message]) -> dict[str, str]:
        """One private-use character per protected string, none of which the messages contain."""
        used = {character for message in messages for character in message.content}
        for base in MARKER_BASES:
            markers = {chr(base + i): text for i, text in enumerate(self._protected)}
            if not used & markers.keys():
                return markers
        raise RowRefused("private_use_characters", "the text fills both private-use planes")

    def _piece_spans(self, piece: Piece, before: str, markers: dict[str, str]) -> list[Span]:
        hidden = any(marker in piece.text for marker in markers)
        if not hidden and not self._cut_out_stop:
            return [Span(piece.text, self._spans.anchor_after(before), plain=False)]
        return self._plain_spans(piece.text, before, markers)

    def _plain_spans(self, text: str, before: str, markers: dict[str, str]) -> list[Span]:
        """Spans of a piece with special-token strings in its user text: only the template's are special."""
        spans: list[Span] = []
        found = [(m.start(), m.end()) for m in self._special_pattern.finditer(text)]
        previous = self._spans.anchor_after(before)
        cursor = 0
        for start, end in [*found, (len(text), len(text))]:
            ordinary, special = text[cursor:start], text[start:end]
            # The tokenizer's own rule for special tokens that swallow the space beside them.
            if special and self._special[special].lstrip:
                ordinary = ordinary.rstrip()
            if previous in self._special and self._special[previous].rstrip:
                ordinary = ordinary.lstrip()
            behind = self._spans.after_special if previous in self._special else self._spans.in_text
            spans += self._ordinary_spans(ordinary, behind if before or cursor else "", markers)
            if special:
                spans.append(Span(special, "", False, (self._spans.token_ids[special],)))
            previous, cursor = special, end
        return spans

    def _ordinary_spans(self, text: str, anchor: str, markers: dict[str, str]) -> list[Span]:
        """Put the hidden strings back; one that no tokenizer option keeps ordinary is cut in its middle."""
        for marker, original in markers.items():
            if original in self._spans.special:
                text = text.replace(marker, original)
        spans = []
        for marker, original in markers.items():
            if original not in self._spans.special:
                half = len(original) // 2
                text = text.replace(marker, original[:half] + marker + original[half:])
        for part in re.split("[" + "".join(markers) + "]", text) if markers else [text]:
            if part:
                spans.append(Span(part, anchor, plain=True))
                anchor = self._spans.in_text
        return spans

    def _plan_document(self, row: Document) -> list[tuple[list[Span], bool]]:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        first = [([Span("", "", False, (int(bos),))], False)] if bos is not None else []
        last = [([Span("", "", False, (int(eos),))], True)] if eos is not None else []
        anchor = self._spans.after_special if first else ""
        return [*first, ([Span(row.text, anchor, plain=True)], True), *last]

    def _find_end_of_turn(self) -> int:
        text = self.template.end_of_turn
        if text in self._spans.token_ids:
            return self._spans.token_ids[text]
        ids = self._spans.ids([text], plain=False)[0]
        if len(ids) != 1:
            raise ConfigError(
                f"model.chat_template={self.template.name}: its end-of-turn text {text!r} is {len(ids)} "
                "tokens of this tokenizer, and generation stops on one. Add it with model.add_tokens, set "
                "model.end_of_turn to a token, or choose another template."
            )
        if ids[0] in unknown_ids(self.tokenizer):
            raise ConfigError(
                f"model.chat_template={self.template.name}: its end-of-turn text {text!r} is not in this tokenizer's "
                "vocabulary, so a model would learn to stop at any unknown text. Add it with model.add_tokens, set "
                "model.end_of_turn to a token, or choose another template."
            )
        return ids[0]

    def _assemble(self, parts: list[tuple[list[int], bool]], *, is_document: bool) -> Encoded:
        while parts and not parts[-1][1]:
            parts = parts[:-1]
        encoded = Encoded([], [])
        for ids, supervised in parts:
            if supervised:
                encoded.turn_starts.append(len(encoded.input_ids))
                encoded.num_stops += bool(ids) and ids[-1] == self.end_of_turn_id
            encoded.input_ids += ids
            encoded.loss_mask += [supervised] * len(ids)
            if supervised:
                encoded.turn_ends.append(len(encoded.input_ids))
        if is_document:
            encoded.turn_starts, encoded.turn_ends = encoded.turn_starts[:1], encoded.turn_ends[-1:]
            encoded.num_stops = 0
        encoded.has_bos = encoded.input_ids[:1] == [self.tokenizer.bos_token_id]
        if encoded.loss_mask:
            encoded.loss_mask[0] = False
        return encoded


def encode(row: Conversation | Document, tokenizer: TextTokenizer, template: ChatTemplate) -> Encoded:
    """Encode one row; `Encoder` does the same for many.

    Raises:
        RowRefused: There is nothing to learn in it, or the template cannot be cut into its turns.
    """
    return Encoder(tokenizer, template).encode(row)


def encode_prompt(messages: Sequence[Message], tokenizer: TextTokenizer, template: ChatTemplate) -> list[int]:
    """Ids of a generation prompt: the same ids that training sees before the answer."""
    return Encoder(tokenizer, template).encode_prompt(messages)
