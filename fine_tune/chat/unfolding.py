"""Tokens to text while they come: never half a character, and in the end what decoding them at once gives."""

from __future__ import annotations

from typing import Any

# What a decoder writes for bytes that are no character (yet).
INCOMPLETE = "\ufffd"
SETTLED_TOKENS = 16


class Unfolding:
    """The text of a growing list of tokens, handed out piece by piece.

    Only the last tokens are decoded again, behind some whose text is known: a tokenizer may join a token to the one
    before it. White space at the end waits for what follows, as an answer has none at its ends; so do bytes that may
    become a character.

    Attributes:
        ids: The tokens so far.
        shown: The text handed out so far.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.shown = ""
        self._start, self._known, self._offset = 0, 0, 0
        self._sent = ""

    def add(self, token: int) -> str:
        """Take a token and return the text that has become certain, often none."""
        self.ids.append(token)
        tail = self._decode(self._start)[self._offset :]
        whole = tail.rstrip(INCOMPLETE) if tail.endswith(INCOMPLETE) else tail
        certain = whole.rstrip()
        if not certain.startswith(self._sent):
            # The decoder has changed its mind about text that is out already: the end tells.
            return ""
        new = certain[len(self._sent) :]
        self._sent = certain
        if certain == tail and len(self.ids) - self._known >= SETTLED_TOKENS:
            self._settle()
        if not self.shown:
            new = new.lstrip()
        self.shown += new
        return new

    def text(self) -> str:
        """Return the whole text, as an evaluation reads it."""
        return self._decode(0).strip()

    def _settle(self) -> None:
        self._start, self._known = self._known, len(self.ids)
        self._offset = len(self._decode(self._start))
        self._sent = ""

    def _decode(self, start: int) -> str:
        text: str = self.tokenizer.decode(self.ids[start:], skip_special_tokens=True)
        return text
