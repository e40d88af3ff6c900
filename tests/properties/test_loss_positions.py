"""N7 and N8: the loss is that of the supervised tokens, each scored by what comes before it, to 40 digits."""

from __future__ import annotations

from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fine_tune.losses.logps import token_logps
from fine_tune.losses.sft import sft_loss
from fine_tune.models.forward import supervised_logps
from fine_tune.packing.batches import pack

from ..unit.models.conftest import VOCABULARY
from .drawn import LENGTHS, SEEDS, TOLERANCE, own_logits, plain, rows_of
from .judging import Step, distance, exceeds, same, slopes_of, step

pytestmark = pytest.mark.usefixtures("exact_norm")
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), min_size=3, max_size=3)
SUMS = 1e-12  # relative, a few products and a log-sum-exp in float64


@plain(8)
@given(lengths=LENGTHS, seed=SEEDS)
def test_n07_rows_of_prompt_alone_have_no_loss_and_no_gradient(
    network: nn.Module, lengths: list[int], seed: int
) -> None:
    silent = [(ids, np.zeros_like(mask)) for ids, mask in rows_of(lengths, seed)]
    found = step(network, lambda: sft_loss(supervised_logps(network, pack(silent)), num_step_tokens=1))
    assert found.values.item() == 0.0
    assert found.gradients.abs().max().item() == 0.0
    taught = step(
        network, lambda: sft_loss(supervised_logps(network, pack(rows_of(lengths, seed))), num_step_tokens=99)
    )
    assert taught.gradients.abs().max().item() > 1e-6, "the same rows with something to learn"


def three_tokens(network: nn.Module, ids: list[int], *, shift: int) -> Tensor:
    """By hand: the second and third token, scored by the logits ``shift`` places before each."""
    logits = own_logits(network, torch.tensor([ids]))[0]
    probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return -(probabilities[1 - shift, ids[1]].log() + probabilities[2 - shift, ids[2]].log()) / 2


@plain(10)
@given(ids=TOKENS)
def test_n07_a_token_is_scored_by_the_logits_before_it(network: nn.Module, ids: list[int]) -> None:
    micro = pack([(np.array(ids), np.array([False, True, True]))])
    ours = step(network, lambda: sft_loss(supervised_logps(network, micro), num_step_tokens=2))
    same(ours, step(network, lambda: three_tokens(network, ids, shift=1)), TOLERANCE)


def test_n07_control_a_token_that_is_scored_by_its_own_logits(network: nn.Module) -> None:
    ids = [5, 17, 40]
    right, broken = (step(network, lambda shift=shift: three_tokens(network, ids, shift=shift)) for shift in (1, 0))
    exceeds(broken, right, TOLERANCE)


def test_n07_control_a_mask_that_holds_the_prompt(network: nn.Module) -> None:
    rows = rows_of([6, 9])
    assert not all(mask[1:].all() for _, mask in rows)
    whole = [(ids, np.arange(len(ids)) > 0) for ids, _ in rows]
    right, broken = (
        step(network, lambda rows=rows: sft_loss(supervised_logps(network, pack(rows)), num_step_tokens=20))
        for rows in (rows, whole)
    )
    exceeds(broken, right, TOLERANCE)


class Head:
    """States, head and masked targets of at most three rows of five tokens over seven words."""

    def __init__(self, seed: int, rows: int, tokens: int, words: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        count = rows * tokens
        self.leaves = tuple(
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in ((count, 2), (words, 2), (words,))
        )
        self.targets = torch.randint(0, words, (count,), generator=generator)
        self.mask = torch.rand(count, generator=generator) < 0.5
        self.mask[0] = True

    def ours(self, states: Tensor, weight: Tensor, bias: Tensor, *, count: int | None = None) -> Tensor:
        logps = token_logps(states[self.mask], weight, self.targets[self.mask], bias=bias, chunk_tokens=2)
        return sft_loss(logps, num_step_tokens=count or int(self.mask.sum()))

    def judged(self) -> Step:
        """Mean of ``-log softmax`` over the mask, and its slopes ``(softmax - onehot) / count``, in 40 digits."""
        with localcontext() as digits:
            digits.prec = 40
            states, weight, (bias,) = ([[Decimal(x) for x in row] for row in leaf.reshape(-1, leaf.shape[-1]).tolist()]
                                       for leaf in self.leaves)  # fmt: skip
            count, width, loss = Decimal(int(self.mask.sum())), range(2), Decimal(0)
            of_states = [[Decimal(0)] * 2 for _ in states]
            of_weight, of_bias = [[Decimal(0)] * 2 for _ in weight], [Decimal(0)] * len(bias)
            for n, target in enumerate(self.targets.tolist()):
                if not self.mask[n]:
                    continue
                powers = [
                    (sum(states[n][h] * row[h] for h in width) + b).exp() for row, b in zip(weight, bias, strict=True)
                ]
                total = sum(powers)
                loss -= (powers[target] / total).ln() / count
                for v, power in enumerate(powers):
                    slope = (power / total - (v == target)) / count
                    of_bias[v] += slope
                    for h in width:
                        of_states[n][h] += slope * weight[v][h]
                        of_weight[v][h] += slope * states[n][h]
        slopes = [float(x) for row in (*of_states, *of_weight, of_bias) for x in row]
        return Step(torch.tensor(float(loss), dtype=torch.float64), torch.tensor(slopes, dtype=torch.float64))


@plain(25)
@given(seed=SEEDS, rows=st.integers(1, 3), tokens=st.integers(1, 5), words=st.integers(2, 7))
def test_n08_the_masked_loss_is_that_of_40_digits(seed: int, rows: int, tokens: int, words: int) -> None:
    head = Head(seed, rows, tokens, words)
    same(slopes_of(head.ours, *head.leaves), head.judged(), SUMS)


def test_n08_control_a_mean_over_all_tokens() -> None:
    head = Head(0, 3, 5, 7)
    assert not head.mask.all()
    broken = slopes_of(lambda *leaves: head.ours(*leaves, count=len(head.mask)), *head.leaves)
    exceeds(broken, head.judged(), SUMS)


def test_n08_control_the_mask_turned_round() -> None:
    head = Head(0, 3, 5, 7)
    right = head.judged()
    head.mask = ~head.mask
    exceeds(slopes_of(head.ours, *head.leaves), right, SUMS)
    assert distance(head.judged().values, right.values) > 0.01
