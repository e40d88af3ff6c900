"""Log-probabilities of answer letters after prompts that share their beginning, which is computed once.

A choice's score is the summed log-probability of the tokens that ``encode(prompt + " X")`` adds after ``encode(prompt)``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fine_tune.errors import ConfigError, DataError
from fine_tune.evaluation.blocked_attention import BLOCKED, Places, register
from fine_tune.evaluation.generate import generating
from fine_tune.evaluation.side_by_side import side_by_side
from fine_tune.losses.logps import log_softmax_rows
from fine_tune.models.adapter import causal_lm
from fine_tune.models.base import decoder, output_head, set_attention

# What a pass of its own costs, in tokens: below this a shared beginning is cheaper read again.
PASS_COST_TOKENS = 64
# Keys and values of a shared beginning are copied for each row of a pass: so many keys for each new token are allowed.
KEYS_PER_TOKEN = 4
# Every choice repeats its prompt: all of a benchmark at once would be lists of tens of millions of ids.
ENCODED_AT_A_TIME = 64


class ChoicePrompt(NamedTuple):
    """An encoded prompt ``[L]`` and the tokens that each choice adds to it."""

    ids: np.ndarray
    endings: tuple[tuple[int, ...], ...]


class Shared(NamedTuple):
    """Rows that begin with the same ``length`` tokens."""

    length: int
    members: tuple[int, ...]


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

    Raises:
        DataError: A choice adds no token of its own to a prompt.
    """
    found: list[ChoicePrompt] = []
    for start in range(0, len(prompts), ENCODED_AT_A_TIME):
        found += _encode(tokenizer, prompts[start : start + ENCODED_AT_A_TIME], letters)
    return found


def _encode(tokenizer: Any, prompts: Sequence[str], letters: Sequence[str]) -> list[ChoicePrompt]:
    texts = [text for prompt in prompts for text in (prompt, *(f"{prompt} {letter}" for letter in letters))]
    encoded = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    found = []
    for start in range(0, len(texts), 1 + len(letters)):
        alone, *whole = encoded[start : start + 1 + len(letters)]
        endings = tuple(tuple(ids[len(alone) :]) for ids in whole)
        if not alone or not all(endings):
            raise DataError(
                f"model.path: its tokenizer gives {texts[start][-20:]!r} no token, or joins a choice with it, so that nothing "
                "is left to score. Choose another tokenizer."
            )
        found.append(ChoicePrompt(np.array(alone, dtype=np.int64), endings))
    return found


def share_beginnings(rows: Sequence[np.ndarray], *, pass_cost: int = PASS_COST_TOKENS) -> list[Shared]:
    """Group rows by what they begin with, so that the fewest tokens are computed.

    A group of n rows that share p tokens saves ``(n - 1) * p`` and costs a pass. In lexicographic order rows with a common
    beginning are neighbours, so the best division of that order is the best of all. Rows without a partner come last, as
    one group of length 0.
    """
    # Big-endian bytes sort as the numbers do.
    order = sorted(range(len(rows)), key=lambda i: rows[i].astype(">u4").tobytes())
    common = [common_beginning(rows[a], rows[b]) for a, b in pairwise(order)]
    saved, cut = [0], [0]
    for end in range(1, len(order) + 1):
        best, start = saved[end - 1], end - 1
        length = None
        for first in range(end - 2, -1, -1):
            length = common[first] if length is None else min(length, common[first])
            if length == 0:
                break
            gain = saved[first] + (end - first - 1) * length - pass_cost
            if gain >= best:
                best, start = gain, first
        saved.append(best)
        cut.append(start)
    groups, end = [], len(order)
    while end:
        groups.append(order[cut[end] : end])
        end = cut[end]
    shared = [Shared(_shared_length(rows, group), tuple(sorted(group))) for group in groups if len(group) > 1]
    alone = sorted(group[0] for group in groups if len(group) == 1)
    return sorted(shared, key=lambda one: one.members) + ([Shared(0, tuple(alone))] if alone else [])


def _shared_length(rows: Sequence[np.ndarray], group: Sequence[int]) -> int:
    # First and last in order differ earliest.
    return common_beginning(rows[group[0]], rows[group[-1]])


def common_beginning(first: np.ndarray, second: np.ndarray) -> int:
    """Count the tokens before two rows differ.

    Example:
        >>> common_beginning(np.array([1, 2, 3]), np.array([1, 2, 4, 5]))
        2
    """
    size = min(len(first), len(second))
    different = np.flatnonzero(first[:size] != second[:size])
    return int(different[0]) if len(different) else size


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


def choice_logps(
    network: nn.Module, prompts: Sequence[ChoicePrompt], *, context: int, pass_tokens: int = 1024
) -> list[list[float]]:
    """Score every choice of every prompt.

    Args:
        network: A causal language model with packed attention, adapted or not.
        prompts: What to score; those with a common beginning share its computation.
        context: Most tokens that the model sees; longer prompts keep their last ones.
        pass_tokens: Most tokens of one forward pass, padding included and shared beginnings not; with those, four times as many.

    Returns:
        Log-probabilities in nats, per prompt and choice.
    """
    rows = [row for index, prompt in enumerate(prompts) for row in rows_of(prompt, index, context)]
    scores = [[0.0] * len(prompt.endings) for prompt in prompts]
    # A compiled layer would be made anew for every length of the cache.
    with torch.compiler.set_stance("force_eager"), generating(network):
        _speed_up(network)
        for shared in share_beginnings([row.ids for row in rows]):
            members = [rows[i] for i in shared.members]
            # The state of the first read belongs to the rows: it is where they stop being the same.
            length = min(shared.length, *(row.first_read for row in members))
            cache = _read_beginning(network, members[0].ids[:length])
            read_rows = partial(_read_rows, network, cache=cache, shared=length)
            batches = _batches(members, length, pass_tokens)
            for found in side_by_side(read_rows, batches, causal_lm(network).device):
                for read, logp in found:
                    scores[read.prompt][read.choice] += logp
    return scores


def _speed_up(network: nn.Module) -> None:
    """On a CPU take an attention of our own; elsewhere torch's kernels are as good."""
    inner = causal_lm(network)
    if inner.device.type == "cpu":
        register()
        set_attention(inner, BLOCKED)


def _read_beginning(network: nn.Module, ids: np.ndarray) -> DynamicCache | None:
    if not len(ids):
        return None
    inner = causal_lm(network)
    cache = DynamicCache(config=inner.config)
    decoder(inner)(input_ids=torch.from_numpy(ids)[None].to(inner.device), past_key_values=cache, use_cache=True)
    return cache


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


def _read_rows(
    network: nn.Module, rows: Sequence[Row], *, cache: DynamicCache | None, shared: int
) -> list[tuple[Read, float]]:
    inner = causal_lm(network)
    own = [torch.from_numpy(row.ids[shared:]) for row in rows]
    # Padding is on the right, where causal attention hides it; 0 is as good as any token.
    ids = nn.utils.rnn.pad_sequence(own, batch_first=True).to(inner.device)
    options: dict[str, Any] = {"use_cache": False}
    if cache is not None:
        # A pass writes into its cache, and sliding windows forget: every pass starts from a fresh copy.
        past = copy.deepcopy(cache)
        past.batch_repeat_interleave(len(rows))
        options = {"use_cache": True, "past_key_values": past}
    reads = [(n, read.position - shared, read) for n, row in enumerate(rows) for read in row.reads]
    places = {place: i for i, place in enumerate(dict.fromkeys((n, position) for n, position, _ in reads))}
    at = Places(*torch.tensor(list(places), device=ids.device).T)
    states: Tensor = decoder(inner)(input_ids=ids, places=at, **options).last_hidden_state
    logps = log_softmax_rows(states[at.rows, at.positions], *output_head(inner))
    where = torch.tensor([places[n, position] for n, position, _ in reads], device=ids.device)
    targets = torch.tensor([read.target for _, _, read in reads], device=ids.device)
    found = logps[where, targets].double().tolist()
    return [(read, logp) for (_, _, read), logp in zip(reads, found, strict=True)]
