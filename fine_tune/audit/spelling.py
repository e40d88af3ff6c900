"""Token ids as the stretches of text that they write, one for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

# Stands for bytes that do not make a character.
BROKEN = "\ufffd"


def spell(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds to those before it; they join to the text of all.

    A character of several tokens is written by the last of them, so the others add nothing.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return [str(token) for token in tokenizer.convert_ids_to_tokens([int(i) for i in ids])]
    stream = DecodeStream(skip_special_tokens=False)
    texts: list[str] = []
    for token in ids:
        try:
            texts.append(stream.step(backend, int(token)) or "")
        except Exception as error:
            # The library raises a bare Exception for bytes that no text has: begin anew behind them.
            if type(error) is not Exception:
                raise
            stream = DecodeStream(skip_special_tokens=False)
            texts.append(BROKEN)
    if texts and not texts[-1]:
        texts[-1] = BROKEN
    return texts
