"""Log-probabilities of answer letters after prompts that share their beginning, which is computed once and kept: the CPU's way.

A choice's score is the summed log-probability of the tokens that ``encode(prompt + " X")`` adds after ``encode(prompt)``. On a GPU
:mod:`fine_tune.evaluation.packed_choices` finds the same scores in fewer and larger passes.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fine_tune.evaluation.blocked_attention import BLOCKED, Places, register
from fine_tune.evaluation.choice_rows import ChoicePrompt, Read, Row, rows_of
from fine_tune.evaluation.generate import generating
from fine_tune.evaluation.shared_beginnings import share_beginnings
from fine_tune.evaluation.side_by_side import side_by_side
from fine_tune.losses.logps import log_softmax_rows
from fine_tune.models.adapter import causal_lm
from fine_tune.models.base import decoder, output_head, set_attention

# Keys and values of a shared beginning are copied for each row of a pass: so many keys for each new token are allowed.
KEYS_PER_TOKEN = 4


def choice_logps(
    network: nn.Module, chunks: Sequence[Sequence[ChoicePrompt]], *, context: int, pass_tokens: int = 1024
) -> Generator[list[list[float]], None, None]:
    """Score every choice of every prompt, chunk by chunk; on a CPU the next chunks are under way meanwhile.

    Args:
        network: A causal language model with packed attention, adapted or not; in evaluation mode until the end, or ``close``.
        chunks: What to score; prompts of one chunk with a common beginning share its computation.
        context: Most tokens that the model sees; longer prompts keep their last ones.
        pass_tokens: Most tokens of one forward pass, padding included and shared beginnings not; with those, four times as many.

    Yields:
        Log-probabilities in nats of one chunk, per prompt and choice. No other chunk has a part in them.
    """
    # A compiled layer would be made anew for every length of the cache.
    with torch.compiler.set_stance("force_eager"), generating(network):
        _speed_up(network)
        passes = (one for prompts in chunks for one in _passes(network, prompts, context, pass_tokens))
        with closing(side_by_side(_read, passes, causal_lm(network).device)) as found:
            for prompts in chunks:
                scores = [[0.0] * len(prompt.endings) for prompt in prompts]
                missing = sum(len(ending) for prompt in prompts for ending in prompt.endings)
                while missing:
                    for read, logp in next(found):
                        scores[read.prompt][read.choice] += logp
                        missing -= 1
                yield scores


def _speed_up(network: nn.Module) -> None:
    """On a CPU take an attention of our own; elsewhere torch's kernels are as good."""
    inner = causal_lm(network)
    if inner.device.type == "cpu":
        register()
        set_attention(inner, BLOCKED)


class _Beginning:
    """Keys and values of what rows share; the first pass that needs them computes them, others wait for it."""

    def __init__(self, inner: Any, ids: np.ndarray) -> None:
        self.inner, self.ids = inner, ids
        self._cache: DynamicCache | None = None
        self._lock = Lock()

    def for_rows(self, count: int) -> DynamicCache | None:
        """Return a copy for each of so many rows: a pass writes into its cache, and sliding windows forget."""
        if not len(self.ids):
            return None
        with self._lock:
            if self._cache is None:
                self._cache = self._read()
        past = copy.deepcopy(self._cache)
        past.batch_repeat_interleave(count)
        return past

    def _read(self) -> DynamicCache:
        cache = DynamicCache(config=self.inner.config)
        ids = torch.from_numpy(self.ids)[None].to(self.inner.device)
        nowhere = torch.empty(2, 0, dtype=torch.long, device=ids.device)
        decoder(self.inner)(input_ids=ids, past_key_values=cache, use_cache=True, places=Places(*nowhere))
        return cache


class _Pass(NamedTuple):
    """Rows that go through the model together, behind what they share."""

    beginning: _Beginning
    rows: list[Row]


def _passes(network: nn.Module, prompts: Sequence[ChoicePrompt], context: int, pass_tokens: int) -> Iterator[_Pass]:
    rows = [row for index, prompt in enumerate(prompts) for row in rows_of(prompt, index, context)]
    for shared in share_beginnings([row.ids for row in rows]):
        members = [rows[i] for i in shared.members]
        # The state of the first read belongs to the rows: it is where they stop being the same.
        length = min(shared.length, *(row.first_read for row in members))
        beginning = _Beginning(causal_lm(network), members[0].ids[:length])
        for batch in _batches(members, length, pass_tokens):
            yield _Pass(beginning, batch)


def _batches(rows: Sequence[Row], shared: int, pass_tokens: int) -> list[list[Row]]:
    """Rows of similar length together, the longest first, so that running out of memory shows at once."""
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        # The first row of a batch is its longest.
        keys = len(batches[-1][0].ids) if batches else 0
        most = min(pass_tokens // max(1, keys - shared), KEYS_PER_TOKEN * pass_tokens // max(1, keys))
        if not batches or len(batches[-1]) >= most:
            batches.append([])
        batches[-1].append(row)
    return batches


def _read(one: _Pass) -> list[tuple[Read, float]]:
    beginning, rows = one
    inner, shared = beginning.inner, len(beginning.ids)
    own = [torch.from_numpy(row.ids[shared:]) for row in rows]
    # Padding is on the right, where causal attention hides it; 0 is as good as any token.
    ids = nn.utils.rnn.pad_sequence(own, batch_first=True).to(inner.device)
    past = beginning.for_rows(len(rows))
    reads = [(n, read.position - shared, read) for n, row in enumerate(rows) for read in row.reads]
    places = {place: i for i, place in enumerate(dict.fromkeys((n, position) for n, position, _ in reads))}
    at = Places(*torch.tensor(list(places), device=ids.device).T)
    out = decoder(inner)(input_ids=ids, past_key_values=past, use_cache=past is not None, places=at)
    states: Tensor = out.last_hidden_state[at.rows, at.positions]
    logps = log_softmax_rows(states, *output_head(inner))
    where = torch.tensor([places[n, position] for n, position, _ in reads], device=ids.device)
    targets = torch.tensor([read.target for _, _, read in reads], device=ids.device)
    found = logps[where, targets].double().tolist()
    return [(read, logp) for (_, _, read), logp in zip(reads, found, strict=True)]
