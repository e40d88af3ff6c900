"""N32: what can be learned is learned, what cannot is not, and at a rate of nought nothing moves."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fine_tune.models.adapter import AdapterSpec, attach, trained_state
from fine_tune.modules.dpo import DPOModule
from fine_tune.modules.optim import OptimSpec
from fine_tune.modules.sft import SFTModule
from fine_tune.packing.batches import MicroBatch, StepBatch, pack

from ..unit.models.conftest import VOCABULARY, llama
from ..unit.modules.conftest import dpo, fit, pairs, policy, step_of
from .judging import FACTOR, exceeds

pytestmark = [
    # Lightning's advice about workers, logging and validation does not concern a loop this small.
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    # Lightning 2.6 asks torch 2.11 for a class that it deprecates.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
]
LEARNED = 0.02  # nats per token; of 48 words, guessing costs 3.9
STEPS = 40


def eight(seed: int) -> MicroBatch:
    """Eight rows of random words after a first one that tells them apart."""
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(8):
        ids = np.concatenate([[index], generator.integers(8, VOCABULARY, 6)])
        rows.append((ids, np.arange(7) > 0))
    return pack(rows)


def learner(*, rate: float) -> SFTModule:
    torch.manual_seed(3)
    spec = OptimSpec(torch.optim.AdamW, lr=rate, schedule="cosine", warmup_share=0.05)
    model = llama()
    # A random head of this width can hardly be sure of anything.
    model.lm_head.weight.data *= 20
    return SFTModule(attach(model, AdapterSpec("adapter", rank=16, alpha=32.0)), optim=spec, num_steps=STEPS)


def curve(folder: Path, module: SFTModule, *, same_rows: bool = True) -> list[float]:
    steps: list[StepBatch] = [step_of(eight(0 if same_rows else step), step=step) for step in range(STEPS)]
    return [result.loss for result in fit(module, folder, steps)]


def test_n32_eight_rows_are_learned_by_heart(tmp_path: Path) -> None:
    losses = curve(tmp_path, learner(rate=1e-2))
    assert losses[0] > 3.5
    assert losses[-1] < LEARNED


def test_n32_control_rows_that_are_others_in_every_step(tmp_path: Path) -> None:
    losses = curve(tmp_path, learner(rate=1e-2), same_rows=False)
    print(f"control: {losses[-1]:.3f} nats, allowed {LEARNED}")
    assert losses[-1] >= FACTOR * LEARNED
    assert losses[-1] > math.log(VOCABULARY - 8) * 0.9, "guessing among the words there are"


def preferring(folder: Path, *, rate: float, swapped_half: bool = False, steps: int = 15) -> tuple[float, DPOModule]:
    """Share of eight pairs in their order after the last step."""
    spec = OptimSpec(torch.optim.AdamW, lr=rate, schedule="constant", warmup_share=0.0, max_grad_norm=None)
    module = dpo(policy(torch.float32), num_steps=steps, beta=1.0, optim=spec)

    def batch(step: int) -> StepBatch:
        return step_of(pairs(*range(8), swapped=swapped_half and step % 2 == 1), step=step)

    results = fit(module, folder, [batch(step) for step in range(steps)])
    return results[-1].metrics["rewards/accuracies"], module


def test_n32_eight_pairs_come_into_their_order(tmp_path: Path) -> None:
    assert preferring(tmp_path, rate=1e-2)[0] == 1.0


def test_n32_control_pairs_whose_sides_change_in_every_step(tmp_path: Path) -> None:
    exceeds(*(torch.tensor([found]) for found in (preferring(tmp_path, rate=1e-2, swapped_half=True)[0], 1.0)), 1e-3)


def flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in state.values()])


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_n32_at_a_rate_of_nought_no_bit_moves(tmp_path: Path, objective: str) -> None:
    def ends(rate: float, folder: Path) -> tuple[Tensor, Tensor]:
        if objective == "dpo":
            start = flat(trained_state(policy(torch.float32)))
            return start, flat(trained_state(preferring(folder, rate=rate, steps=2)[1].network))
        module = learner(rate=rate)
        start = flat(trained_state(module.network))
        fit(module, folder, [step_of(eight(0), step=step) for step in range(3)])
        return start, flat(trained_state(module.network))

    start, end = ends(0.0, tmp_path / "still")
    assert torch.equal(start, end)
    # The control: any other rate moves all of it.
    start, end = ends(1e-4, tmp_path / "moved")
    assert (start != end).double().mean().item() > 0.99
    exceeds(end, start, 0.0)
