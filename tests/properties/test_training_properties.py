"""What must hold whatever the rows are: order, prompts and an adapter at its start change nothing they should not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fine_tune.losses.sft import sft_loss
from fine_tune.models.adapter import AdapterSpec, attach, causal_lm, trainable
from fine_tune.models.forward import supervised_logps
from fine_tune.packing.batches import MicroBatch, pack

from ..unit.models.conftest import VOCABULARY, llama, randomize
from .drawn import rows_of

PLAIN = settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
LENGTHS = st.lists(st.integers(2, 14), min_size=2, max_size=6)
TOLERANCE = 1e-10  # float64; rounding stays near 1e-15


@pytest.fixture(scope="module")
def network() -> nn.Module:
    # Not attach: it keeps adapters in float32, and these equalities are told apart in float64.
    model = llama().double()
    found = attach(model, AdapterSpec(trains="adapter", rank=4, alpha=8.0)).double()
    randomize(found)
    return found


def gradient(network: nn.Module, micro: MicroBatch) -> tuple[float, Tensor]:
    network.zero_grad()
    loss = sft_loss(supervised_logps(network, micro), num_step_tokens=len(micro.rows))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainable(network).values() if p.grad is not None])


@PLAIN
@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_the_order_of_rows_changes_nothing(network: nn.Module, lengths: list[int], seed: int) -> None:
    rows = rows_of(lengths)
    order = np.random.default_rng(seed).permutation(len(rows))
    loss, slope = gradient(network, pack(rows))
    swapped_loss, swapped_slope = gradient(network, pack([rows[i] for i in order]))
    assert swapped_loss == pytest.approx(loss, abs=TOLERANCE)
    torch.testing.assert_close(swapped_slope, slope, rtol=0, atol=TOLERANCE)


@PLAIN
@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_only_supervised_rows_send_a_gradient_into_the_head(network: nn.Module, lengths: list[int], seed: int) -> None:
    micro = pack(rows_of(lengths, seed))
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    hook = causal_lm(network).model.norm.register_forward_hook(keep)
    try:
        gradient(network, micro)
    finally:
        hook.remove()
    (states,) = seen
    assert states.grad is not None
    reached = states.grad[0].abs().sum(-1) > 0
    assert reached.nonzero().squeeze(1).tolist() == micro.rows.tolist()


@PLAIN
@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_what_follows_the_last_supervised_token_changes_nothing(
    network: nn.Module, lengths: list[int], seed: int
) -> None:
    rows = rows_of(lengths, seed)
    tail = np.random.default_rng(seed).integers(0, VOCABULARY, 5)
    longer = [(np.concatenate([ids, tail]), np.concatenate([mask, np.zeros(5, dtype=bool)])) for ids, mask in rows]
    loss, slope = gradient(network, pack(rows))
    longer_loss, longer_slope = gradient(network, pack(longer))
    assert longer_loss == pytest.approx(loss, abs=TOLERANCE)
    torch.testing.assert_close(longer_slope, slope, rtol=0, atol=TOLERANCE)


@PLAIN
@given(lengths=LENGTHS, spec=st.sampled_from(["plain", "rank_stabilized", "use_dora", "new_tokens"]))
def test_an_adapter_at_its_start_is_the_base(lengths: list[int], spec: str) -> None:
    options = {} if spec == "plain" else {spec: [3, 4] if spec == "new_tokens" else True}
    micro = pack(rows_of(lengths))
    with torch.no_grad():
        base = supervised_logps(llama(), micro)
        adapted = supervised_logps(attach(llama(), AdapterSpec(trains="adapter", rank=4, **options)), micro)  # type: ignore[arg-type]
    # DoRA divides by a norm and multiplies by the same norm again.
    torch.testing.assert_close(adapted, base, rtol=0, atol=1e-5 if spec == "use_dora" else 0)


@PLAIN
@given(lengths=st.lists(st.integers(4, 14), min_size=2, max_size=6))
def test_the_first_gradient_of_plain_lora_reaches_b_and_not_a(lengths: list[int]) -> None:
    network = attach(llama(), AdapterSpec(trains="adapter", rank=4))
    gradient(network, pack(rows_of(lengths)))
    for name, parameter in trainable(network).items():
        assert parameter.grad is not None
        assert (parameter.grad.abs().max() > 0).item() is ("lora_B" in name)
