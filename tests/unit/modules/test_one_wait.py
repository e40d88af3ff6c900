"""A training step reads from the device once, whatever the objective and however many micro-batches it has."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fine_tune.models.adapter import AdapterSpec, attach
from fine_tune.modules.optim import OptimSpec
from fine_tune.modules.sft import SFTModule
from fine_tune.modules.step import StepModule

from ..models.conftest import llama
from .conftest import dpo, fit, pairs, policy, step_of

pytestmark = [
    # Lightning's advice about workers, logging and validation does not concern a loop this small.
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
]
# What makes the host wait for a device: a value asked for, as a number, a truth or an array.
READS = ("tolist", "item", "cpu", "numpy", "nonzero", "__float__", "__int__", "__bool__", "__index__")
# Made from Python's own numbers, wherever the model is.
ON_THE_HOST = ("_bucket_of",)


def descent(groups: Any, *, lr: float, betas: Any, eps: float, weight_decay: float) -> torch.optim.Optimizer:
    """Gradient descent: on a CPU Adam asks its own counters, which lie on the host wherever it runs."""
    return torch.optim.SGD(groups, lr=lr)


SGD = OptimSpec(descent, lr=1e-2, schedule="constant", warmup_share=0.0, max_grad_norm=0.5)


class Reads:
    """Where values were asked for during each training step, outermost call only."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.steps: list[list[str]] = []
        self.depth: int | None = None
        for name in READS:
            patch.setattr(Tensor, name, self._noting(name))
        original = StepModule.training_step

        def training_step(module: StepModule, *args: Any) -> None:
            self.steps.append([])
            self.depth = 0
            try:
                original(module, *args)
            finally:
                self.depth = None

        patch.setattr(StepModule, "training_step", training_step)

    def _noting(self, name: str) -> Any:
        original = getattr(Tensor, name)

        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.depth is None:
                return original(tensor, *args, **kwargs)
            if self.depth == 0:
                caller = traceback.extract_stack(limit=2)[0]
                if caller.name not in ON_THE_HOST:
                    self.steps[-1].append(f"{name} in {Path(caller.filename).name}, {caller.name}")
            self.depth += 1
            try:
                return original(tensor, *args, **kwargs)
            finally:
                self.depth -= 1

        return read


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reads]:
    with pytest.MonkeyPatch.context() as patch:
        yield Reads(patch)


WAIT = "tolist in step.py, on_before_optimizer_step"


def test_supervised_fine_tuning_waits_once_a_step(tmp_path: Path, reads: Reads) -> None:
    network = attach(llama(), AdapterSpec(trains="adapter", rank=4, alpha=8.0))
    module = SFTModule(network, optim=SGD, num_steps=2, head_chunk_tokens=5)
    results = fit(module, tmp_path, [step_of(pairs(0, 1), pairs(2)), step_of(pairs(3), step=1)])
    assert reads.steps == [[WAIT], [WAIT]]
    assert [result.loss > 1 and result.grad_norm > 0 for result in results] == [True, True]


def test_a_preference_step_waits_once_after_the_check_of_the_first(tmp_path: Path, reads: Reads) -> None:
    module = dpo(policy(torch.float32), optim=SGD, num_steps=3)
    steps = [step_of(pairs(2 * i), pairs(2 * i + 1), step=i) for i in range(3)]
    results = fit(module, tmp_path, steps)
    assert reads.steps[1:] == [[WAIT], [WAIT]]
    assert reads.steps[0].count(WAIT) == 1
    assert all(result.metrics.keys() >= {"rewards/margins", "logps/chosen"} for result in results)


def test_a_step_that_reads_more_is_told_apart(tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a loss that is looked at in each micro-batch."""
    original = SFTModule.micro_loss

    def curious(self: SFTModule, *args: Any) -> Tensor:
        share = original(self, *args)
        assert float(share.detach()) > 0
        return share

    monkeypatch.setattr(SFTModule, "micro_loss", curious)
    network = attach(llama(), AdapterSpec(trains="adapter", rank=4, alpha=8.0))
    fit(SFTModule(network, optim=SGD, num_steps=1), tmp_path, [step_of(pairs(0), pairs(1))])
    mine = "in test_one_wait.py, curious"
    assert reads.steps == [[f"__float__ {mine}", f"__float__ {mine}", WAIT]]
