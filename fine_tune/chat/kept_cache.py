"""Keys and values that are kept from one answer to the next, as far as the tokens before them are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class KeptCache:
    """What one checkpoint has computed of a conversation.

    Attributes:
        ids: The tokens whose keys and values are there.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._cache: DynamicCache | None = None

    def take(self, prompt: Sequence[int], config: Any) -> tuple[DynamicCache, int]:
        """Return the cache of the longest known beginning of a prompt, and that length; the last token is always new.

        Until :meth:`put` nothing is kept, so that an answer that breaks off anywhere leaves no half-written cache.

        Args:
            prompt: Token ids.
            config: The model's text config, which says what its layers keep.
        """
        cache, known = self._cache, self.ids
        self._cache, self.ids = None, []
        shared = same_beginning(known, prompt[:-1])
        excess = len(known) - shared
        # Layers that forget (sliding windows) can go on, but not back.
        if cache is None or shared == 0 or (excess and not all(type(layer) is DynamicLayer for layer in cache.layers)):
            return DynamicCache(config=config), 0
        if excess:
            cache.crop(-excess)
        return cache, shared

    def put(self, cache: DynamicCache, ids: Sequence[int]) -> None:
        """Keep a cache that holds exactly these tokens."""
        assert cache.get_seq_length() == len(ids), "every token that went through the model is in its cache"
        self._cache, self.ids = cache, list(ids)


def same_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the first tokens that are the same.

    Example:
        >>> same_beginning([1, 2, 3], [1, 2, 4, 5])
        2
    """
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
