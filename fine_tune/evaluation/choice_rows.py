"""What has to be computed for multiple choice: prompts, the tokens that each choice adds to them, and where these are read off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers.models import BPE

from fine_tune.errors import ConfigError, DataError

# Every choice repeats its prompt: all of a benchmark at once would be lists of tens of millions of ids.
ENCODED_AT_A_TIME = 64
# How vocabularies write a space.
SPACES = (" ", "\u2581", "\u0120")


class ChoicePrompt(NamedTuple):
    """An encoded prompt ``[L]`` and the tokens that each choice adds to it."""

    ids: np.ndarray
    endings: tuple[tuple[int, ...], ...]


class Read(NamedTuple):
    """Token ``target`` of one choice of one prompt, predicted at ``position`` of a row."""

    prompt: int
    choice: int
    position: int
    target: int


class Row(NamedTuple):
    """Tokens ``[L]`` that go through the model, and what is read off their hidden states."""

    ids: np.ndarray
    reads: list[Read]

    @property
    def first_read(self) -> int:
        """The earliest position that is read; a shared beginning ends at or before it."""
        return min(read.position for read in self.reads)


def encode_choices(tokenizer: Any, prompts: Sequence[str], letters: Sequence[str]) -> list[ChoicePrompt]:
    """Encode prompts, alone and with each choice behind a space.

    Where no token can reach over the end of a prompt, what a choice adds is the same for all prompts with that end, and is
    encoded once.

    Raises:
        DataError: A choice adds no token of its own to a prompt.
    """
    firsts: dict[str, str] = {}
    for prompt in prompts:
        firsts.setdefault(prompt[-1:], prompt)
    known = {end: _endings(tokenizer, [first], letters)[0] for end, first in firsts.items() if ends_tokens(tokenizer, end)}
    found: list[ChoicePrompt] = []
    for start in range(0, len(prompts), ENCODED_AT_A_TIME):
        batch = prompts[start : start + ENCODED_AT_A_TIME]
        own = iter(_endings(tokenizer, [prompt for prompt in batch if prompt[-1:] not in known], letters))
        for prompt, ids in zip(batch, _ids(tokenizer, batch), strict=True):
            endings = known[prompt[-1:]] if prompt[-1:] in known else next(own)
            _check(prompt, ids, endings)
            found.append(ChoicePrompt(np.array(ids, dtype=np.int64), endings))
    return found


def ends_tokens(tokenizer: Any, end: str) -> bool:
    """Tell whether every token ends at this character where a space follows, whatever stands before it.

    Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) joins neighbours that are a token together. No token that holds
    the character and a space behind it: nothing is ever joined across, and either side is encoded as it is alone.
    """
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    # Other characters are several bytes, each written as a character of its own.
    if not isinstance(model, BPE) or not (len(end) == 1 and end.isascii() and end.isprintable()) or end == " ":
        return False
    # Tokens that were added may take the space behind them.
    added = any(text.endswith(end) for text in tokenizer.get_added_vocab())
    return not added and not any(end + space in token for token in tokenizer.get_vocab() for space in SPACES)


def _endings(tokenizer: Any, prompts: Sequence[str], letters: Sequence[str]) -> list[tuple[tuple[int, ...], ...]]:
    """Return what each choice adds to each prompt."""
    encoded = _ids(tokenizer, [text for prompt in prompts for text in (prompt, *(f"{prompt} {letter}" for letter in letters))])
    found = []
    for start in range(0, len(encoded), 1 + len(letters)):
        alone, *whole = encoded[start : start + 1 + len(letters)]
        found.append(tuple(tuple(ids[len(alone) :]) for ids in whole))
    return found


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    found: list[list[int]] = tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]
    return found


def _check(prompt: str, ids: Sequence[int], endings: Sequence[Sequence[int]]) -> None:
    if not ids or not all(endings):
        raise DataError(
            f"model.path: its tokenizer gives {prompt[-20:]!r} no token, or joins a choice with it, so that nothing "
            "is left to score. Choose another tokenizer."
        )


def rows_of(prompt: ChoicePrompt, index: int, context: int) -> list[Row]:
    """Lay out what has to be computed for one prompt.

    Choices of one token are all read off the prompt's last state; one of several tokens needs its own first ones behind the
    prompt. A prompt too long for the context keeps its last tokens.

    Raises:
        ConfigError: The context has no room for a choice.
    """
    rows: list[Row] = []
    # Longest first: what a shorter choice needs is then there already.
    for choice in sorted(range(len(prompt.endings)), key=lambda i: -len(prompt.endings[i])):
        ending = prompt.endings[choice]
        if len(ending) > context:
            raise ConfigError(f"eval.context_length={context}: a choice has {len(ending)} tokens. Raise it.")
        ids = np.concatenate([prompt.ids, np.array(ending[:-1], dtype=np.int64)])[-context:]
        row = next((row for row in rows if np.array_equal(row.ids[: len(ids)], ids)), None)
        if row is None:
            row = Row(ids, [])
            rows.append(row)
        first = len(ids) - len(ending)
        row.reads.extend(Read(index, choice, first + i, token) for i, token in enumerate(ending))
    return rows
