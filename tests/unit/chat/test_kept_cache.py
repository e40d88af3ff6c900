"""What is kept of a conversation gives the logits of computing it anew, and is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from fine_tune.chat.kept_cache import KeptCache
from fine_tune.evaluation.generate import Batch

from ..models.conftest import VOCABULARY, llama


def model(*, window: int | None = None) -> Any:
    torch.manual_seed(0)
    if window is None:
        made: Any = llama()
    else:
        config = MistralConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, sliding_window=window,
        )  # fmt: skip
        made = MistralForCausalLM(config)
    made.set_attn_implementation("sdpa")
    return made.eval()


@torch.no_grad()
def logits(made: Any, kept: KeptCache, prompt: Sequence[int]) -> tuple[Tensor, int]:
    """The next token's logits through what is kept, and how many tokens were computed for them."""
    cache, known = kept.take(prompt, made.config)
    found = Batch(made, torch.ones(1, len(prompt), dtype=torch.long), cache).step(torch.tensor([prompt[known:]]))
    kept.put(cache, prompt)
    return found, len(prompt) - known


TURNS = [
    ([1, 2, 3, 4], 4),
    ([1, 2, 3, 4, 5, 6], 2),
    ([1, 2, 3, 4, 5, 6], 1),
    ([1, 2, 9, 9, 9], 3),
    ([1, 2], 1),
    ([7, 8, 9], 3),
    ([7], 1),
]


def test_a_known_beginning_is_computed_once_and_changes_nothing() -> None:
    made, kept = model(), KeptCache()
    for prompt, computed in TURNS:
        found, num = logits(made, kept, prompt)
        fresh, _ = logits(made, KeptCache(), prompt)
        torch.testing.assert_close(found, fresh, rtol=0, atol=1e-6)
        assert num == computed
        assert kept.ids == prompt


def test_layers_that_forget_go_on_but_not_back() -> None:
    made, kept = model(window=4), KeptCache()
    counts = []
    for prompt in ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 9]):
        found, num = logits(made, kept, prompt)
        torch.testing.assert_close(found, logits(made, KeptCache(), prompt)[0], rtol=0, atol=1e-6)
        counts.append(num)
    assert counts == [6, 2, 6]


def test_what_breaks_off_leaves_nothing_behind() -> None:
    made, kept = model(), KeptCache()
    logits(made, kept, [1, 2, 3])
    kept.take([1, 2, 3, 4], made.config)
    assert kept.ids == []
    assert logits(made, kept, [1, 2, 3, 4])[1] == 4


def test_a_cache_of_other_tokens_is_not_kept() -> None:
    made, kept = model(), KeptCache()
    cache, _ = kept.take([1, 2], made.config)
    with pytest.raises(AssertionError, match="every token that went through the model is in its cache"):
        kept.put(cache, [1, 2])
