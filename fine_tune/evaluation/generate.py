"""Batched generation with a KV cache: batch of n equals one by one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fine_tune.evaluation.sampling import Chooser, Sampling
from fine_tune.models.adapter import causal_lm
from fine_tune.models.attention import PACKED
from fine_tune.models.base import set_attention
from fine_tune.models.merged_meanwhile import merged_meanwhile


@dataclass(frozen=True)
class Decoding:
    """When a completion ends and how its tokens are chosen.

    Attributes:
        stop_ids: Any of these ends a completion; it is not part of what is returned.
        pad_id: Fills the left of shorter prompts; it is masked.
        max_new_tokens: Most tokens of a completion.
        sampling: Greedy by default.
    """

    stop_ids: tuple[int, ...]
    pad_id: int
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)


class Generated(NamedTuple):
    """New token ids without the stop token, and whether a stop token ended them (otherwise the limit did)."""

    ids: list[int]
    stopped: bool


@contextmanager
def generating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with a cache-friendly attention; training mode and attention come back afterwards."""
    inner = causal_lm(model)
    training = [module for module in model.modules() if module.training]
    model.eval()
    set_attention(inner, "sdpa")
    try:
        with torch.no_grad():
            yield
    finally:
        set_attention(inner, PACKED)
        for module in training:
            module.training = True


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    decoding: Decoding,
    keys: Sequence[str] | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[Generated]:
    """Continue each prompt until a stop token or the limit; no random state is read or moved.

    Args:
        model: A causal language model, adapted or not.
        prompts: Token ids, one list per prompt, never empty.
        decoding: When to stop and how to choose.
        keys: A name per prompt, from which sampling takes its numbers; the prompt's place by default.
        batch_size: Prompts at a time; prompts of similar length go together.
        progress: Called with the number of prompts finished since the last call.

    Returns:
        One completion per prompt, in the order of ``prompts``.
    """
    keys = [str(index) for index in range(len(prompts))] if keys is None else keys
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions: list[Generated] = [Generated([], False) for _ in prompts]
    with generating(model), merged_meanwhile(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = _continue(model, [prompts[i] for i in chosen], [keys[i] for i in chosen], decoding)
            for index, row in zip(chosen, rows, strict=True):
                completions[index] = row
            if progress is not None:
                progress(len(chosen))
    return completions


def greedy(model: nn.Module, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
    """Continue each prompt greedily and return the new ids.

    ``options`` are ``stop_ids``, ``pad_id`` and ``max_new_tokens`` of :class:`Decoding`, and ``batch_size`` and
    ``progress`` of :func:`generate`.
    """
    limits = {name: options.pop(name) for name in ("pad_id", "max_new_tokens")}
    decoding = Decoding(stop_ids=tuple(options.pop("stop_ids")), **limits)
    return [found.ids for found in generate(model, prompts, decoding=decoding, **options)]


def _continue(
    model: nn.Module, prompts: Sequence[Sequence[int]], keys: Sequence[str], decoding: Decoding
) -> list[Generated]:
    """Continue one batch. It is our own loop: a finished row leaves the batch, so that one long answer is not paid by all."""
    inner: Any = causal_lm(model)
    ids, mask = _left_padded(prompts, decoding.pad_id, inner.device)
    batch = Batch(inner, mask)
    chooser = Chooser(decoding.sampling, keys, decoding.max_new_tokens)
    found: list[list[int]] = [[] for _ in prompts]
    stopped: set[int] = set()
    for place in range(decoding.max_new_tokens):
        chosen = chooser.choose(batch.step(ids), batch.rows, place)
        for row, token in zip(batch.rows, chosen.tolist(), strict=True):
            if token in decoding.stop_ids:
                stopped.add(row)
            elif row not in stopped:
                found[row].append(token)
        if len(stopped) == len(prompts):
            break
        ids = batch.without(stopped, chosen[:, None])
    return [Generated(row_ids, row in stopped) for row, row_ids in enumerate(found)]


class Batch:
    """Rows that still grow, with their cache.

    Args:
        model: A causal language model in evaluation mode.
        mask: False where a prompt is padded, ``[R, T]``.
        cache: Keys and values of the first tokens of the prompts, where they are known already.

    Attributes:
        rows: Which prompt each row continues.
    """

    def __init__(self, model: Any, mask: Tensor, cache: DynamicCache | None = None) -> None:
        self.model, self.mask = model, mask
        self.rows = list(range(len(mask)))
        self.cache = DynamicCache(config=model.config.get_text_config()) if cache is None else cache
        # Of a prompt only the last token's logits are wanted; nearly every model can leave the others out.
        can_skip = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.options: dict[str, Any] = {"logits_to_keep": 1} if can_skip else {}

    def step(self, ids: Tensor) -> Tensor:
        """Run the new tokens, ``[R, T]``, and return the logits of the next one, ``[R, V]``."""
        # The tokens chosen since the prompt are seen by all that follow.
        new = self.cache.get_seq_length() + ids.shape[1] - self.mask.shape[1]
        self.mask = nn.functional.pad(self.mask, (0, new), value=1)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **self.options,
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def without(self, stopped: set[int], ids: Tensor) -> Tensor:
        """Drop finished rows, and with them their new tokens, once they are a quarter: it copies the cache."""
        kept = [place for place, row in enumerate(self.rows) if row not in stopped]
        if 4 * len(kept) > 3 * len(self.rows):
            return ids
        index = torch.tensor(kept, device=ids.device)
        self.rows = [self.rows[place] for place in kept]
        self.mask = self.mask[index]
        self.cache.batch_select_indices(index)
        return ids[index]


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids.to(device), mask.to(device)
