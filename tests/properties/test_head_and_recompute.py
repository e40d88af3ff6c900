"""N11 and N12: chunks of the head and activations computed twice are a matter of memory, not of the result."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fine_tune.losses.logps import token_logps
from fine_tune.losses.sft import sft_loss
from fine_tune.models.adapter import AdapterSpec, attach, causal_lm
from fine_tune.models.execution import Execution, prepare_layers
from fine_tune.models.forward import supervised_logps
from fine_tune.packing.batches import MicroBatch, pack

from ..unit.models.conftest import llama, randomize
from .drawn import LENGTHS, SEEDS, TOLERANCE, plain, rows_of
from .judging import Step, distance, exceeds, same, slopes_of, step

pytestmark = pytest.mark.usefixtures("exact_norm")
SUMS = 1e-12
WEIGHTS = torch.linspace(0.5, 2.0, 64, dtype=torch.float64)


def head_parts(seed: int, rows: int, words: int) -> tuple[tuple[Tensor, ...], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    leaves = tuple(torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((rows, 6), (words, 6), (words,)))
    return leaves, torch.randint(0, words, (rows,), generator=generator)


def whole_head(targets: Tensor, *leaves: Tensor, rows: int | None = None) -> Tensor:
    """All logits at once and torch's cross-entropy; every row has a weight of its own."""
    states, weight, bias = leaves
    logps = -F.cross_entropy(states @ weight.T + bias, targets, reduction="none")
    return (WEIGHTS[: len(targets)] * logps)[:rows]


def chunked_head(targets: Tensor, *leaves: Tensor, chunk: int) -> Tensor:
    states, weight, bias = leaves
    return WEIGHTS[: len(targets)] * token_logps(states, weight, targets, bias=bias, chunk_tokens=chunk)


@plain(40)
@given(seed=SEEDS, rows=st.integers(1, 40), words=st.integers(2, 53), chunk=st.integers(1, 50), trained=st.booleans())
def test_n11_any_chunk_of_the_head_is_the_whole_head(
    seed: int, rows: int, words: int, chunk: int, trained: bool
) -> None:
    leaves, targets = head_parts(seed, rows, words)
    if not trained:
        # A frozen head takes another way: only the states have a gradient.
        frozen, leaves = leaves[1:], leaves[:1]
        found = slopes_of(lambda states: chunked_head(targets, states, *frozen, chunk=chunk), *leaves)
        same(found, slopes_of(lambda states: whole_head(targets, states, *frozen), *leaves), SUMS)
        return
    found = slopes_of(lambda *own: chunked_head(targets, *own, chunk=chunk), *leaves)
    same(found, slopes_of(lambda *own: whole_head(targets, *own), *leaves), SUMS)


def test_n11_control_the_last_chunk_is_left_out() -> None:
    leaves, targets = head_parts(0, 23, 31)
    right = slopes_of(lambda *own: whole_head(targets, *own).sum(), *leaves)
    exceeds(slopes_of(lambda *own: whole_head(targets, *own, rows=20).sum(), *leaves), right, SUMS)


def test_n11_control_a_softmax_over_a_part_of_the_words() -> None:
    leaves, targets = head_parts(0, 23, 31)
    targets %= 28
    right = slopes_of(lambda *own: whole_head(targets, *own), *leaves)
    unseen = torch.cat([torch.zeros(28), torch.full((3,), -1e3)]).double()
    exceeds(slopes_of(lambda x, w, b: whole_head(targets, x, w, b + unseen), *leaves), right, SUMS)


@cache
def learner(recompute: str) -> nn.Module:
    """The same network under each execution, with dropout that draws; one of each."""
    found = attach(llama().double(), AdapterSpec(trains="adapter", rank=4, alpha=8.0, dropout=0.2)).double()
    randomize(found)
    if recompute == "forgetful":
        causal_lm(found).gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    elif recompute != "none":
        prepare_layers(found, Execution(recompute))  # type: ignore[arg-type]
    return found


def drawing(recompute: str, micro: MicroBatch) -> Step:
    model = learner(recompute)
    torch.manual_seed(5)
    return step(model, lambda: sft_loss(supervised_logps(model, micro), num_step_tokens=len(micro.rows)))


@plain(4)
@given(lengths=LENGTHS, seed=SEEDS)
def test_n12_activations_computed_twice_change_nothing(lengths: list[int], seed: int) -> None:
    micro = pack(rows_of(lengths, seed))
    kept = drawing("none", micro)
    for recompute in ("selective", "full"):
        same(drawing(recompute, micro), kept, TOLERANCE)


@plain(5)
@given(lengths=LENGTHS, seed=SEEDS)
def test_n12_neither_all_logits_nor_a_cache_change_anything(network: nn.Module, lengths: list[int], seed: int) -> None:
    """Ours takes the rows it wants before the head, and keeps no cache."""
    micro = pack(rows_of(lengths, seed))
    told = {"input_ids": micro.input_ids, "position_ids": micro.position_ids, "segments": micro.segments}
    places = micro.rows.unique()

    def every(use_cache: bool, keep: Tensor | int) -> Tensor:
        logits = network(**told, use_cache=use_cache, logits_to_keep=keep).logits[0]
        wanted = micro.rows if isinstance(keep, int) else torch.searchsorted(keep, micro.rows)
        return logits.log_softmax(-1)[wanted].gather(1, micro.targets[:, None]).squeeze(1)

    ours = step(network, lambda: supervised_logps(network, micro))
    for use_cache, keep in ((False, 0), (True, 0), (False, places)):
        same(step(network, lambda use_cache=use_cache, keep=keep: every(use_cache, keep)), ours, TOLERANCE)


def test_n12_control_dropout_is_drawn_anew_in_the_second_pass() -> None:
    """The loss is that of the first pass, so only the gradients tell."""
    micro = pack(rows_of([5, 9, 7]))
    kept, broken = drawing("none", micro), drawing("forgetful", micro)
    assert distance(broken.values, kept.values) <= TOLERANCE
    exceeds(broken.gradients, kept.gradients, TOLERANCE)


def test_n12_control_logits_of_other_places() -> None:
    model, micro = learner("none"), pack(rows_of([5, 9, 7]))
    model.eval()
    right = step(model, lambda: supervised_logps(model, micro))
    micro.rows = micro.rows + 1
    exceeds(step(model, lambda: supervised_logps(model, micro)), right, TOLERANCE)
    model.train()
