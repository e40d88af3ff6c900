"""Log-probabilities of answer letters in few large passes: beginnings and everything that continues them, laid end to end.

The GPU's way: a pass of a few hundred tokens takes a GPU as long as one of some thousand. What shares a beginning attends to its
one copy, as the completions of a preference pair do to their prompt (Krishna et al. 2024, arXiv:2410.20305), so no keys or values
are kept from one pass to the next.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from fine_tune.evaluation.choice_rows import ChoicePrompt, Read, Row, rows_of
from fine_tune.evaluation.shared_beginnings import share_beginnings
from fine_tune.losses.logps import log_softmax_rows
from fine_tune.models.adapter import causal_lm
from fine_tune.models.base import decoder, output_head
from fine_tune.packing.batches import MicroBatch, Sample, pack

# Attention reads a shared beginning's keys once for each row: so many keys for each token of a full pass are allowed.
KEYS_PER_TOKEN = 8


class _Group(NamedTuple):
    """Rows that lie behind one copy of the tokens that they share."""

    shared: int
    rows: list[Row]

    def tokens(self) -> int:
        return self.shared + sum(len(row.ids) - self.shared for row in self.rows)

    def keys(self) -> int:
        return sum(len(row.ids) for row in self.rows)

    def sample(self) -> Sample:
        """Lay the group down as one sample; nothing of it is learned."""
        own = [row.ids[self.shared :] for row in self.rows]
        ids = np.concatenate([self.rows[0].ids[: self.shared], *own])
        return Sample(ids, np.zeros(len(ids), dtype=bool), self.starts() if self.shared else ())

    def starts(self) -> tuple[int, ...]:
        """Where each row's own tokens begin in the sample."""
        sizes = [len(row.ids) - self.shared for row in self.rows]
        return tuple(self.shared + int(size) for size in np.cumsum([0, *sizes])[:-1])


def packed_choice_logps(
    network: nn.Module, chunks: Sequence[Sequence[ChoicePrompt]], *, context: int, pass_tokens: int = 8192
) -> Generator[list[list[float]], None, None]:
    """Score every choice of every prompt, chunk by chunk.

    Args:
        network: A causal language model with packed attention, adapted or not, in evaluation mode and without gradients.
        chunks: What to score; prompts of one chunk with a common beginning share its computation.
        context: Most tokens that the model sees; longer prompts keep their last ones.
        pass_tokens: Most tokens of one forward pass; a single longer row has one to itself.

    Yields:
        Log-probabilities in nats of one chunk, per prompt and choice. No other chunk has a part in them.
    """
    # A compiled layer would be made anew without a backward pass.
    with torch.compiler.set_stance("force_eager"):
        for prompts in chunks:
            scores = [[0.0] * len(prompt.endings) for prompt in prompts]
            for groups in _passes(prompts, context, pass_tokens):
                for read, logp in _read(network, groups):
                    scores[read.prompt][read.choice] += logp
            yield scores


def _passes(prompts: Sequence[ChoicePrompt], context: int, pass_tokens: int) -> Iterator[list[_Group]]:
    """Fill passes with groups, in order; one that does not fit is divided, and its beginning read again."""
    groups: list[_Group] = []
    for shared, row in _rows(prompts, context):
        room = pass_tokens - sum(group.tokens() for group in groups)
        keys = KEYS_PER_TOKEN * pass_tokens - sum(group.keys() for group in groups)
        goes_on = bool(groups) and _continues(groups[-1], shared, row)
        cost = len(row.ids) - (shared if goes_on else 0)
        if groups and (cost > room or len(row.ids) > keys):
            yield groups
            groups, goes_on = [], False
        if not goes_on:
            groups.append(_Group(shared, []))
        groups[-1].rows.append(row)
    if groups:
        yield groups


def _continues(group: _Group, shared: int, row: Row) -> bool:
    return 0 < shared == group.shared and np.array_equal(group.rows[0].ids[:shared], row.ids[:shared])


def _rows(prompts: Sequence[ChoicePrompt], context: int) -> Iterator[tuple[int, Row]]:
    """Yield every row with the number of tokens that it shares with its neighbours."""
    rows = [row for index, prompt in enumerate(prompts) for row in rows_of(prompt, index, context)]
    # A beginning costs no pass of its own here.
    for shared in share_beginnings([row.ids for row in rows], pass_cost=1):
        members = [rows[i] for i in shared.members]
        # The state of the first read belongs to the rows: it is where they stop being the same.
        length = min(shared.length, *(row.first_read for row in members))
        for row in members:
            yield length, row


def _read(network: nn.Module, groups: Sequence[_Group]) -> list[tuple[Read, float]]:
    inner = causal_lm(network)
    micro = pack([group.sample() for group in groups]).to(inner.device)
    places, reads = _places(groups)
    # Choices of one token are all read off one state.
    distinct = {place: i for i, place in enumerate(dict.fromkeys(places))}
    logps = log_softmax_rows(_states(network, micro, list(distinct)), *output_head(inner))
    where = torch.tensor([distinct[place] for place in places], device=logps.device)
    targets = torch.tensor([read.target for read in reads], device=logps.device)
    return list(zip(reads, logps[where, targets].double().tolist(), strict=True))


def _places(groups: Sequence[_Group]) -> tuple[list[int], list[Read]]:
    """Return what is read, and the place in the pass of the state that predicts it."""
    places: list[int] = []
    reads: list[Read] = []
    before = 0
    for group in groups:
        for start, row in zip(group.starts(), group.rows, strict=True):
            places += [before + start + read.position - group.shared for read in row.reads]
            reads += row.reads
        before += group.tokens()
    return places, reads


def _states(network: nn.Module, micro: MicroBatch, places: list[int]) -> torch.Tensor:
    out = decoder(causal_lm(network))(
        input_ids=micro.input_ids, position_ids=micro.position_ids, use_cache=False, segments=micro.segments
    )
    states: torch.Tensor = out.last_hidden_state[0]
    return states.index_select(0, torch.tensor(places, device=states.device))
