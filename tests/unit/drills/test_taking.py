"""One step in several ways: the same in float64, and the mistakes made on purpose are far off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fine_tune.device import DevicePlan
from fine_tune.drills.equivalence import Way, _Drill, _ways
from fine_tune.drills.loaded import Loaded, keep_norms_wide, layers_run
from fine_tune.drills.taking import Taken, Taker, alone, apart, as_two_sequences, leaking, uneven, whole
from fine_tune.models import attention
from fine_tune.models.execution import Execution
from fine_tune.modules.sft import SFTModule
from fine_tune.packing.batches import MicroBatch, StepBatch, pack

from ..models.conftest import VOCABULARY
from ..modules.conftest import ADAMW, dpo, moved_reference, pairs, policy, step_of

EXACT = 1e-12
CPU = DevicePlan(torch.device("cpu"), "cpu", "32-true", 1, 0)


def conversation(index: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(index)
    length = int(generator.integers(4, 30))
    return generator.integers(0, VOCABULARY, length), np.arange(length) >= length // 2


def conversations(*rows: int) -> MicroBatch:
    return pack([conversation(row) for row in rows], rows)


def subject(objective: str) -> tuple[Taker, StepBatch]:
    network = policy()
    keep_norms_wide(network)
    if objective == "sft":
        module: Any = SFTModule(network, optim=ADAMW, num_steps=3, head_chunk_tokens=7)
        return Taker(module, CPU), step_of(conversations(0, 1, 2), conversations(3, 4))
    module = dpo(network, moved_reference(network), allow_other_start=True)
    return Taker(module, CPU), step_of(pairs(0, 1, 2), pairs(3, 4))


def rows_of(micros: list[MicroBatch]) -> list[tuple[int, ...]]:
    return [micro.samples for micro in micros]


def test_rows_are_dealt_out_whole() -> None:
    micros = [conversations(0, 1, 2), conversations(3, 4)]
    assert rows_of(whole(micros)) == [(0, 1, 2, 3, 4)]
    assert rows_of(alone(micros)) == [(0,), (1,), (2,), (3,), (4,)]
    assert rows_of(uneven(micros)) == [(0,), (1, 2), (3, 4)]
    assert rows_of(uneven([conversations(0), conversations(1)])) == [(0,), (1,)]
    for dealt in (whole(micros), alone(micros), uneven(micros)):
        assert torch.cat([micro.targets for micro in dealt]).tolist() == torch.cat([m.targets for m in micros]).tolist()


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_every_way_gives_one_loss_and_one_gradient(objective: str) -> None:
    taker, batch = subject(objective)
    base = taker.take(batch, batch.micro_batches)
    assert min(grad.norm().item() for grad in base.gradients.values()) > 0
    ways = [whole, alone, uneven, *([as_two_sequences] if objective == "dpo" else [])]
    for deal in ways:
        gaps, _ = apart(base, taker.take(batch, deal(batch.micro_batches)))
        assert max(gaps.values()) < EXACT, deal.__name__
    with layers_run(taker.module.network) as run:
        run(Execution("full"))
        assert max(apart(base, taker.take(batch, alone(batch.micro_batches)))[0].values()) < EXACT


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_mistakes_are_far_off(objective: str) -> None:
    taker, batch = subject(objective)
    base = taker.take(batch, batch.micro_batches)
    for wrong in (
        taker.take(batch, leaking(batch.micro_batches)),
        taker.take(batch, uneven(batch.micro_batches), mean_of_means=True),
        taker.take(batch, batch.micro_batches[:1]),
    ):
        assert apart(base, wrong)[0]["gradients"] > 0.05


def test_rows_alone_go_through_the_models_own_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    taker, batch = subject("sft")
    base = taker.take(batch, batch.micro_batches)

    def forbidden(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("packed attention was asked")

    with monkeypatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, attention.PACKED, forbidden)
        plain = taker.take_plain(batch, alone(batch.micro_batches))
        with pytest.raises(AssertionError, match="packed attention was asked"):
            taker.take(batch, batch.micro_batches)
    assert max(apart(base, plain)[0].values()) < EXACT
    assert taker.take(batch, batch.micro_batches).loss == base.loss, "and packed again afterwards"


def test_layers_run_in_other_ways_and_back() -> None:
    taker, batch = subject("sft")
    counted = 0

    def count(*_: Any) -> None:
        nonlocal counted
        counted += 1

    taker.module.network.get_base_model().model.layers[0].mlp.register_forward_pre_hook(count)  # type: ignore[operator, union-attr]
    def passes() -> int:
        nonlocal counted
        counted = 0
        taker.take(batch, whole(batch.micro_batches))
        return counted

    assert passes() == 1
    with layers_run(taker.module.network) as run:
        run(Execution("full"))
        assert passes() == 2
        with layers_run(taker.module.network) as other:
            other(Execution())
            assert passes() == 1
        assert passes() == 2, "as it was before"
        run(Execution("selective"))
        run(Execution())
        assert passes() == 1
    assert passes() == 1


def test_norms_that_are_llamas_stay_in_float64_and_others_are_left() -> None:
    network = policy()
    assert keep_norms_wide(network) == 5

    class Shifted(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) * 2

    assert keep_norms_wide(torch.nn.Sequential(Shifted(8).double(), torch.nn.LayerNorm(8))) == 0


def test_the_tensor_that_differs_most_is_named_and_small_ones_do_not_decide() -> None:
    left = Taken(2.0, {"large": torch.ones(4), "small": torch.full((4,), 1e-9)})
    right = Taken(2.0, {"large": torch.ones(4), "small": torch.full((4,), 2e-9)})
    gaps, where = apart(left, right)
    assert gaps["gradients"] == pytest.approx(1e-5)
    assert where == "small"
    assert apart(left, left) == ({"loss": 0.0, "gradients": 0.0, "together": 0.0}, "")
    other = Taken(2.2, {"large": 1.5 * torch.ones(4), "small": left.gradients["small"]})
    assert apart(left, other)[0] == pytest.approx({"loss": 0.1, "gradients": 0.5, "together": 0.5})


def test_each_way_is_asked_where_it_says_something() -> None:
    many = step_of(conversations(0, 1), conversations(2))
    names = [way.name for way in _ways(many, Execution(), pairs=False)]
    assert names == [
        "one micro-batch of 3 rows", "3 micro-batches of one row", "control: rows see those before them",
        "control: mean of two micro-batches' means", "rows alone in the model's own attention", "activations computed again",
    ]  # fmt: skip
    single = step_of(conversations(0), conversations(1))
    balanced = Execution("selective", compile=True, fused_lora=True)
    found = {way.name: way for way in _ways(single, balanced, pairs=True)}
    assert "control: rows see those before them" not in found
    assert found["layers uncompiled, nothing computed again"].execution == Execution(fused_lora=True)
    assert found["activations computed again"].execution == Execution("full", fused_lora=True)
    assert "pairs as two sequences, the prompt twice" in found


def test_a_way_that_does_not_fit_is_left_out_and_the_next_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    taker, batch = subject("sft")
    loaded = Loaded({}, taker, None, Execution())  # type: ignore[arg-type]
    drill = _Drill({"data": {"batch": "conversations"}}, Path(), 1, True)
    take = SFTModule.micro_loss

    def large(self: Any, micro: MicroBatch, *args: Any) -> Tensor:
        if len(micro.samples) > 4:
            raise torch.OutOfMemoryError("asked for more than there is")
        return take(self, micro, *args)

    monkeypatch.setattr(SFTModule, "micro_loss", large)
    assert drill._take(loaded, batch, Way("whole", whole)) is None
    found = drill._take(loaded, batch, Way("alone", alone))
    assert found is not None
    monkeypatch.undo()
    assert max(apart(taker.take(batch, batch.micro_batches), found)[0].values()) < EXACT
