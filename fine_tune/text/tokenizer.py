"""What the project asks of a tokenizer, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Protocol


class TextTokenizer(Protocol):
    """The part of a transformers tokenizer that this package calls."""

    bos_token_id: Any
    eos_token_id: Any

    def __call__(self, text: list[str], **options: Any) -> Any:
        """Encode a batch of texts."""

    def decode(self, token_ids: list[int]) -> Any:
        """Turn ids back into text."""

    def get_vocab(self) -> dict[str, int]:
        """All tokens with their ids."""

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """Added tokens by id, each with `content`, `special`, `lstrip` and `rstrip`."""


def unknown_ids(tokenizer: TextTokenizer) -> set[int]:
    """Ids that stand for text which the vocabulary lacks; a tokenizer and its backend may each name one."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    vocabulary = tokenizer.get_vocab()
    named = (getattr(owner, "unk_token", None) for owner in (tokenizer, model))
    return {vocabulary[str(name)] for name in named if name is not None and str(name) in vocabulary}


def tokenizer_fingerprint(tokenizer: TextTokenizer) -> str:
    """Hash everything that decides ids: the backend's own JSON (or the vocabulary) and the special ids.

    Padding and truncation are settings of a call and left out.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state.pop("padding", None)
        state.pop("truncation", None)
    else:
        added = {i: [t.content, t.special] for i, t in tokenizer.added_tokens_decoder.items()}
        state = {"vocab": tokenizer.get_vocab(), "added": added}
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps([state, special], sort_keys=True).encode()).hexdigest()
