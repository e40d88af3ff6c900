"""N16, N17, N19 and N20: what a preference costs, whatever the numbers are. N15 and N18 are held in tests/reference."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fine_tune.errors import DataError
from fine_tune.losses.dpo import PairLengths, PairLogps, dpo_loss, ipo_loss
from fine_tune.models.adapter import adapter_off
from fine_tune.models.execution import Execution, prepare_layers
from fine_tune.models.forward import completion_logps, supervised_logps
from fine_tune.modules.dpo import DPOModule, switch_off_dropout
from fine_tune.packing.batches import MicroBatch, pack
from fine_tune.text.conversation import Message, PreferencePair, RowRefused
from fine_tune.text.encode import Encoder
from fine_tune.text.pairs import encode_pairs
from fine_tune.text.template import load_template

from ..unit.modules.conftest import Taken, dpo, moved_reference, policy
from ..unit.text.conftest import character_tokenizer
from .drawn import SEEDS, pair_of, plain
from .judging import Step, distance, exceeds, same, slopes_of

EXACT = 1e-12
BETAS = st.sampled_from([0.01, 0.1, 0.5, 2.0])
SIZES = st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=1, max_size=4)
NATS = st.floats(-300.0, -1.0, allow_nan=False)
PAIRS = st.lists(st.tuples(NATS, NATS, NATS, NATS), min_size=1, max_size=6)
Numbers = list[tuple[float, float, float, float]]


def columns(pairs: Numbers) -> tuple[Tensor, ...]:
    """Policy's chosen and rejected, the reference's chosen and rejected."""
    return tuple(torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))


def costs(
    pairs: Numbers, beta: float, smoothing: float = 0.0, *, ref: float = 0.0, both: float = 0.0, one: float = 0.0
) -> Step:
    """Loss and slopes in the policy's numbers, with constants added to the policy's sides, one of them, or the reference's."""
    chosen, rejected, ref_chosen, ref_rejected = columns(pairs)
    reference = PairLogps(ref_chosen + ref, ref_rejected + ref)

    def loss(up: Tensor, down: Tensor) -> Tensor:
        return dpo_loss(PairLogps(up + both + one, down + both), reference, beta=beta, label_smoothing=smoothing).loss

    return slopes_of(loss, chosen, rejected)


def margins(pairs: Numbers, beta: float) -> Tensor:
    chosen, rejected, ref_chosen, ref_rejected = columns(pairs)
    return beta * ((chosen - ref_chosen) - (rejected - ref_rejected))


@pytest.fixture(scope="module")
def learner() -> nn.Module:
    """An adapter that has learned something already, on a base with dropout; layers are recomputed."""
    found = policy(dropout=0.1)
    prepare_layers(found, Execution("full"))
    return found


def pairs_of(sizes: list[tuple[int, int, int]], seed: int) -> MicroBatch:
    return pack([pair_of(*size, seed=seed + number) for number, size in enumerate(sizes)])


def closed_form(network: nn.Module, micro: MicroBatch, beta: float) -> Tensor:
    """At the start the loss falls by beta / 2 along the gap between both completions' log-probabilities."""
    network.zero_grad()
    both = completion_logps(supervised_logps(network, micro), micro).view(-1, 2)
    (-(beta / 2) * (both[:, 0] - both[:, 1]).mean()).backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def at_start(module: DPOModule, micro: MicroBatch) -> Step:
    taken = Taken(module, micro)
    return Step(
        torch.tensor(taken.loss, dtype=torch.float64), torch.cat([g.flatten() for g in taken.gradients.values()])
    )


@plain(4)
@given(sizes=SIZES, seed=SEEDS, beta=BETAS)
def test_n16_a_policy_that_is_its_reference_costs_ln_2(
    exact_norm: None, learner: nn.Module, sizes: list[tuple[int, int, int]], seed: int, beta: float
) -> None:
    module, micro = dpo(learner, beta=beta), pairs_of(sizes, seed)
    found = at_start(module, micro)
    assert found.values.item() == pytest.approx(math.log(2), abs=1e-15)
    assert distance(found.gradients, closed_form(learner, micro, beta)) <= 1e-9
    metrics = Taken(module, micro).metrics
    assert (metrics["rewards/chosen"], metrics["rewards/margins"], metrics["rewards/accuracies"]) == (0.0, 0.0, 0.5)


@pytest.mark.parametrize("broken", ["dropout", "another adapter", "the base"])
def test_n16_control_a_reference_that_is_another_model(exact_norm: None, broken: str) -> None:
    network = policy(dropout=0.1)
    micro, module = pairs_of([(4, 5, 3), (2, 6, 7)], 0), dpo(network)
    right = at_start(module, micro)
    if broken == "dropout":
        for each in network.modules():
            if isinstance(each, nn.Dropout):
                each.p = 0.1
    elif broken == "another adapter":
        module = dpo(network, moved_reference(network))
    else:
        with adapter_off(network), torch.no_grad():
            module.stored = completion_logps(supervised_logps(network, micro), micro).view(-1, 2)
    exceeds(at_start(module, micro), right, EXACT)
    switch_off_dropout(network)


@plain(40)
@given(pairs=PAIRS, beta=BETAS, smoothing=st.sampled_from([0.0, 0.1, 0.3, 0.499999]))
def test_n17_the_other_way_round_everything_turns(pairs: Numbers, beta: float, smoothing: float) -> None:
    swapped = [(down, up, ref_down, ref_up) for up, down, ref_up, ref_down in pairs]
    # Margins that were rounded differently would not turn exactly.
    assert torch.equal(margins(swapped, beta), -margins(pairs, beta))
    straight, turned = costs(pairs, beta), costs(swapped, beta)
    count = len(pairs)
    back = torch.cat([turned.gradients[count:], turned.gradients[:count]])
    mixed = Step(
        (1 - smoothing) * straight.values + smoothing * turned.values,
        (1 - smoothing) * straight.gradients + smoothing * back,
    )
    same(costs(pairs, beta, smoothing), mixed, 1e-11)
    chosen, rejected, ref_chosen, ref_rejected = columns(pairs)
    terms = dpo_loss(PairLogps(chosen, rejected), PairLogps(ref_chosen, ref_rejected), beta=beta)
    other = dpo_loss(PairLogps(rejected, chosen), PairLogps(ref_rejected, ref_chosen), beta=beta)
    assert torch.equal(terms.chosen_reward, other.rejected_reward)
    assert torch.equal(terms.rejected_reward, other.chosen_reward)


FIXED: Numbers = [(-20.0, -31.0, -22.5, -30.0), (-90.0, -80.0, -85.0, -82.0), (-5.0, -7.0, -5.5, -9.0)]


def test_n17_control_smoothing_of_the_other_share() -> None:
    exceeds(costs(FIXED, 0.3, 1 - 0.7), costs(FIXED, 0.3, 0.2), 1e-11)
    swapped = [(down, up, ref_down, ref_up) for up, down, ref_up, ref_down in FIXED]
    exceeds(costs(swapped, 0.3), costs(FIXED, 0.3), 1e-11)


@plain(40)
@given(pairs=PAIRS, beta=BETAS, shift=st.floats(-50, 50), more=st.floats(0.5, 20.0))
def test_n19_a_loss_that_falls_with_the_margin_and_sees_nothing_else(
    pairs: Numbers, beta: float, shift: float, more: float
) -> None:
    right = costs(pairs, beta)
    assert (right.values >= 0).all()
    count = len(pairs)
    # Falling everywhere: in the chosen side's number and, with the same slope, in what the rejected side loses.
    assert (right.gradients[:count] <= 0).all()
    assert torch.equal(right.gradients[:count], -right.gradients[count:])
    assert (costs(pairs, beta, one=more).values <= right.values).all()
    same(costs(pairs, beta, both=shift), right, 1e-10)
    same(costs(pairs, beta, ref=shift), right, 1e-10)
    assert distance(costs(pairs, 1e-13).values, torch.full((count,), math.log(2), dtype=torch.float64)) <= 1e-9


def test_n19_control_a_constant_on_one_side_only() -> None:
    exceeds(costs(FIXED, 0.3, one=1.0), costs(FIXED, 0.3), 1e-10)
    chosen, rejected, ref_chosen, ref_rejected = columns(FIXED)
    lengths = PairLengths(torch.tensor([4, 9, 2]), torch.tensor([7, 5, 3]))
    # The mean over tokens sees a constant on both sides: what a loss of sums must not do.
    by_token = [
        slopes_of(
            lambda up, down, c=c: (
                ipo_loss(
                    PairLogps(up + c, down + c), PairLogps(ref_chosen, ref_rejected), beta=0.3, lengths=lengths
                ).loss
            ),
            chosen,
            rejected,
        )
        for c in (0.0, 1.0)
    ]
    exceeds(by_token[1], by_token[0], 1e-10)


def judged(margin: float) -> tuple[float, float]:
    """``log(1 + exp(-h))`` and its slope in 60 digits."""
    with localcontext() as digits:
        digits.prec = 60
        power = (-Decimal(margin)).exp()
        # Beyond 60 digits 1 + power is 1, and its logarithm the power itself.
        loss = (1 + power).ln() if power > Decimal("1e-40") else power
        return float(loss), float(-power / (1 + power))


def far_out(margin: float, dtype: torch.dtype, *, naive: bool = False) -> Step:
    zero = torch.zeros(1, dtype=dtype)

    def loss(up: Tensor) -> Tensor:
        if naive:
            return -torch.log(torch.sigmoid(up))
        return dpo_loss(PairLogps(up, zero), PairLogps(zero, zero), beta=1.0).loss

    return slopes_of(loss, torch.tensor([margin], dtype=dtype))


@plain(60)
@given(margin=st.floats(-1e4, 1e4, allow_nan=False, width=32), wide=st.booleans())
def test_n20_loss_and_slope_are_finite_and_right_however_far_out(margin: float, wide: bool) -> None:
    found = far_out(margin, torch.float64 if wide else torch.float32)
    loss, slope = judged(margin)
    assert found.values.isfinite().all()
    assert found.gradients.isfinite().all()
    # Below 1e-38 float32 has no normal numbers left.
    assert found.values.item() == pytest.approx(loss, rel=1e-12 if wide else 1e-5, abs=1e-300 if wide else 1e-38)
    assert found.gradients.item() == pytest.approx(slope, rel=1e-12 if wide else 1e-5, abs=1e-300 if wide else 1e-38)


@pytest.mark.parametrize("margin", [-200.0, -1e4])
def test_n20_control_the_naive_formula(margin: float) -> None:
    loss, slope = judged(margin)
    right = Step(torch.tensor([loss]), torch.tensor([slope]))
    exceeds(far_out(margin, torch.float32, naive=True), right, 1e-5)


def test_n20_an_empty_completion_is_refused_and_never_divided_by() -> None:
    owner = character_tokenizer()
    encoder = Encoder(owner, load_template("world", bos_token="<s>", eos_token="</s>"))
    (refused,) = encode_pairs(encoder, [PreferencePair((Message("user", "q"),), "a", "", "id", "group")])
    assert isinstance(refused, RowRefused)
    assert isinstance(refused, DataError)
    one = torch.tensor([-3.0])
    for lengths in (
        PairLengths(torch.tensor([0]), torch.tensor([2])),
        PairLengths(torch.tensor([2]), torch.tensor([0])),
    ):
        with pytest.raises(ValueError, match="A completion has no tokens"):
            ipo_loss(PairLogps(one, one), PairLogps(one, one), beta=0.1, lengths=lengths)
