"""A loss scaler in the real loop: what is clipped, recorded and taken is the gradient of the loss, not the scaled one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from fine_tune.errors import NonFiniteError
from fine_tune.models.adapter import trainable, trained_state
from fine_tune.modules.dpo import DPOModule
from fine_tune.modules.optim import OptimSpec
from fine_tune.modules.step import StepResult
from fine_tune.packing.batches import MicroBatch

from .conftest import dpo, fit, pairs, policy, step_of

pytestmark = [
    # Lightning's advice about workers, logging and validation does not concern a loop this small.
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    # Lightning 2.6 asks torch 2.11 for a class that it deprecates.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
]
EXACT = 1e-12
# A power of two: scaling and unscaling round nothing.
SCALE = 2.0**16
# So low that every step is clipped; AdamW's eps so large that its update is not the same at every size of the gradient.
CLIPPED = OptimSpec(torch.optim.AdamW, lr=1e-2, eps=1e-2, schedule="linear", warmup_share=0.0, max_grad_norm=0.01)
STEPS = [step_of(pairs(3 * step, 3 * step + 1), pairs(3 * step + 2), step=step) for step in range(3)]


class Scaler(MixedPrecision):
    """Lightning's plugin for fp16, with its scaler but in float64: on a CPU, and without other rounding."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=SCALE))

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        yield


class ClipsTooEarly(Scaler):
    """The mistake: what clips comes before the scaling is undone."""

    def optimizer_step(self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
        closure()
        model.on_before_optimizer_step(optimizer)
        assert self.scaler is not None
        self.scaler.step(optimizer, **kwargs)
        self.scaler.update()


def run(folder: Path, plugin: Scaler | None, optim: OptimSpec = CLIPPED) -> tuple[dict[str, Tensor], list[StepResult]]:
    network = policy()
    module = dpo(network, optim=optim)
    results = fit(module, folder, STEPS, plugins=None if plugin is None else [plugin])
    return trained_state(network), results


def furthest(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    return max(float((left[name] - right[name]).abs().max()) for name in right)


@pytest.mark.usefixtures("exact_norm")
def test_n25_clipping_is_by_the_norm_after_unscaling(tmp_path: Path) -> None:
    (plain, expected), (scaled, found) = run(tmp_path, None), run(tmp_path, Scaler())
    assert all(result.grad_norm > 2 * 0.01 for result in expected), "every step is clipped"
    for left, right in zip(found, expected, strict=True):
        assert left.grad_norm == pytest.approx(right.grad_norm, rel=EXACT)
        assert left.loss == pytest.approx(right.loss, rel=EXACT)
        assert not left.skipped
    assert furthest(scaled, plain) <= EXACT


@pytest.mark.usefixtures("exact_norm")
def test_n25_control_clipping_before_unscaling(tmp_path: Path) -> None:
    (plain, expected), (scaled, found) = run(tmp_path, None), run(tmp_path, ClipsTooEarly())
    assert found[0].grad_norm == pytest.approx(SCALE * expected[0].grad_norm, rel=EXACT)
    assert furthest(scaled, plain) > 100 * EXACT


def overflow_in(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Let the gradients of these steps have an infinity, though the loss has none."""
    original = DPOModule.micro_loss

    def loss(self: DPOModule, micro: MicroBatch, batch: Any, ratios: Any) -> Tensor:
        share = original(self, micro, batch, ratios)
        if batch.step not in steps:
            return share
        # A finite loss whose slope is not: the root at nought.
        first = next(iter(trainable(self.network).values())).flatten()[0]
        return share + (first - first.detach()).abs().sqrt()

    monkeypatch.setattr(DPOModule, "micro_loss", loss)


@pytest.mark.usefixtures("exact_norm")
def test_an_infinite_gradient_skips_one_update_and_the_rate_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overflow_in(monkeypatch, 1)
    plugin, network = Scaler(), policy()
    states: list[dict[str, Tensor]] = []
    module = dpo(network, optim=CLIPPED, max_skipped_steps=1)
    found = fit(module, tmp_path, STEPS, plugins=[plugin], look=lambda one: states.append(
        {name: tensor.clone() for name, tensor in trained_state(one.network).items()}
    ))  # fmt: skip
    assert [result.skipped for result in found] == [False, True, False]
    assert module.skipped_steps == 1
    assert furthest(states[1], states[0]) == 0.0, "nothing was updated"
    assert furthest(states[2], states[1]) > 0
    assert found[2].learning_rate == found[1].learning_rate < found[0].learning_rate
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() == SCALE / 2


@pytest.mark.usefixtures("exact_norm")
def test_too_many_skipped_updates_in_a_row_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overflow_in(monkeypatch, 1, 2)
    network = policy()
    module = dpo(network, optim=CLIPPED, max_skipped_steps=1)
    with pytest.raises(NonFiniteError, match=r"skipped 2 steps in a row \(trainer\.max_skipped_steps=1\)"):
        fit(module, tmp_path, STEPS, plugins=[Scaler()])
