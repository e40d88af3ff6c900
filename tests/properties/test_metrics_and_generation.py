"""N29 and N30: means over tokens whatever the batch, and answers that do not know their neighbours."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fine_tune.evaluation import generate
from fine_tune.evaluation.generate import greedy
from fine_tune.losses.sft import perplexity
from fine_tune.models import attention
from fine_tune.models.adapter import AdapterSpec, attach, causal_lm
from fine_tune.models.forward import supervised_logps
from fine_tune.modules.ratios import Ratios
from fine_tune.packing.batches import pack
from fine_tune.rng import rng_state

from ..unit.models.conftest import VOCABULARY, llama, randomize
from .drawn import LENGTHS, SEEDS, TOLERANCE, Row, alone, own_logits, plain, rows_of
from .judging import exceeds

NUM = 5
PROMPTS = st.lists(st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=9), min_size=1, max_size=5)


def in_batches(network: nn.Module, rows: list[Row], size: int) -> tuple[float, float]:
    """Perplexity from sums that are added up over batches, and from the mean of the batches' means."""
    ratios, means = Ratios(["loss"], torch.device("cpu")), []
    with torch.no_grad():
        for start in range(0, len(rows), size):
            logps = supervised_logps(network, pack(rows[start : start + size]))
            ratios.add("loss", -logps.sum(), logps.numel())
            means.append(-logps.mean().item())
    return perplexity(ratios.means()["loss"]), perplexity(sum(means) / len(means))


def by_hand(network: nn.Module, rows: list[Row]) -> float:
    with torch.no_grad():
        nats = [-logp for row in rows for logp in alone(network, *row).tolist()]
    return math.exp(math.fsum(nats) / len(nats))


@plain(6)
@given(lengths=LENGTHS, seed=SEEDS, size=st.integers(1, 6))
def test_n29_perplexity_is_that_of_all_tokens_whatever_the_batch(
    exact_norm: None, network: nn.Module, lengths: list[int], seed: int, size: int
) -> None:
    rows = rows_of(lengths, seed)
    assert in_batches(network, rows, size)[0] == pytest.approx(by_hand(network, rows), rel=TOLERANCE)


def test_n29_control_a_mean_of_batch_means(exact_norm: None, network: nn.Module) -> None:
    rows = rows_of([5, 9, 3, 13, 7])
    broken, right = in_batches(network, rows, 2)[1], by_hand(network, rows)
    exceeds(torch.tensor([broken], dtype=torch.float64), torch.tensor([right], dtype=torch.float64), TOLERANCE)


@pytest.fixture(scope="module")
def speaker() -> nn.Module:
    """In training mode with dropout, which an answer must not see; peaked, so that float32 noise decides nothing."""
    found = attach(llama(seed=2), AdapterSpec(trains="adapter", rank=4, dropout=0.5))
    randomize(found)
    causal_lm(found).lm_head.weight.data *= 20
    return found.train()


@contextmanager
def watched(network: nn.Module) -> Iterator[list[Tensor]]:
    """Logits of the next token of each row, call by call."""
    seen: list[Tensor] = []
    hook = causal_lm(network).register_forward_hook(lambda *told: seen.append(told[2].logits[:, -1].clone()))
    try:
        yield seen
    finally:
        hook.remove()


def one_by_one(network: nn.Module, prompts: list[list[int]]) -> tuple[list[list[int]], Tensor]:
    """No cache, no padding, no batch; and the logits behind each prompt."""
    answers, first = [], []
    training = [module for module in network.modules() if module.training]
    network.eval()
    with torch.no_grad():
        for prompt in prompts:
            found: list[int] = []
            for place in range(NUM):
                logits = own_logits(network, torch.tensor([prompt + found]))[0, -1]
                first += [logits] if place == 0 else []
                found.append(int(logits.argmax()))
            answers.append(found)
    for module in training:
        module.training = True
    return answers, torch.stack(first)


def in_one_batch(network: nn.Module, prompts: list[list[int]], pad: int = 0) -> tuple[list[list[int]], Tensor]:
    with watched(network) as seen:
        answers = greedy(network, prompts, stop_ids=[VOCABULARY], pad_id=pad, max_new_tokens=NUM)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    return answers, seen[0][torch.tensor(order).argsort()]


@plain(8)
@given(prompts=PROMPTS, pad=st.integers(0, VOCABULARY - 1))
def test_n30_a_batch_of_prompts_is_answered_as_each_alone(
    speaker: nn.Module, prompts: list[list[int]], pad: int
) -> None:
    (answers, first), (expected, alone_first) = in_one_batch(speaker, prompts, pad), one_by_one(speaker, prompts)
    assert answers == expected
    assert (first - alone_first).abs().max().item() <= 1e-4 * alone_first.abs().max().item()


def drawn_so_far() -> list[Any]:
    """Every random state, in full."""
    states = rng_state()
    return [states["torch"].tolist(), states["python"][1].tolist(), states["numpy"][1].tolist(), states["numpy"][2:]]


@plain(4)
@given(prompts=PROMPTS)
def test_n30_an_answer_leaves_modes_attention_and_random_states(speaker: nn.Module, prompts: list[list[int]]) -> None:
    causal_lm(speaker).model.norm.eval()
    modes = [module.training for module in speaker.modules()]
    assert len(set(modes)) == 2
    before = drawn_so_far()
    greedy(speaker, prompts, stop_ids=[2], pad_id=0, max_new_tokens=NUM)
    assert [module.training for module in speaker.modules()] == modes
    assert causal_lm(speaker).config._attn_implementation == attention.PACKED
    assert drawn_so_far() == before
    # The control: a draw of any of the three would be seen.
    for draw in (lambda: torch.rand(1), random.random, np.random.rand):
        before = drawn_so_far()
        draw()
        assert drawn_so_far() != before


FIXED = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14], [20, 21]]


def test_n30_control_padding_that_is_seen(speaker: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    pad = generate._left_padded
    monkeypatch.setattr(generate, "_left_padded", lambda *told: (pad(*told)[0], torch.ones_like(pad(*told)[1])))
    answers, first = in_one_batch(speaker, FIXED)
    expected, alone_first = one_by_one(speaker, FIXED)
    exceeds(first, alone_first, 1e-4)
    assert answers != expected


def test_n30_control_dropout_in_an_answer(speaker: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "eval", lambda self: self)
    # Merged layers have no dropout: a base in float64 is not merged.
    monkeypatch.setattr(generate, "merged_meanwhile", watched)
    (_, first), alone_first = in_one_batch(speaker, FIXED), one_by_one(speaker, FIXED)[1]
    exceeds(first, alone_first, 1e-4)
