"""Preference pairs, a tiny policy that has learned something already, and a real Lightning loop for both."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fine_tune.models.adapter import AdapterSpec, attach, trainable
from fine_tune.models.execution import Execution, prepare_layers
from fine_tune.modules.dpo import DPOModule
from fine_tune.modules.optim import OptimSpec
from fine_tune.modules.ratios import Ratios
from fine_tune.modules.reference import FrozenAdapter, snapshot
from fine_tune.modules.step import StepModule, StepResult
from fine_tune.packing.batches import MicroBatch, Sample, StepBatch, pack

from ..models.conftest import VOCABULARY, llama, randomize

EXACT = 1e-9
ADAMW = OptimSpec(torch.optim.AdamW, lr=1e-2, schedule="constant", warmup_share=0.0, max_grad_norm=None)
# Settings under which every loss has all of its terms.
EVERY_LOSS: list[dict[str, Any]] = [
    {"loss": "sigmoid", "beta": 0.3, "label_smoothing": 0.1, "nll_weight": 0.5},
    {"loss": "ipo", "beta": 0.2},
    {"loss": "hinge", "beta": 0.5},
    {"loss": "robust", "beta": 0.3, "label_smoothing": 0.1},
]
each_loss = pytest.mark.parametrize("options", EVERY_LOSS, ids=[str(options["loss"]) for options in EVERY_LOSS])


@pytest.fixture
def exact_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep transformers' norm in float64; it goes through float32 otherwise and rounds there."""

    def forward(self: LlamaRMSNorm, states: Tensor) -> Tensor:
        return self.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def policy(dtype: torch.dtype = torch.float64, *, dropout: float = 0.0, checkpointing: bool = False) -> nn.Module:
    """Return an adapted llama whose B is not zero, as after supervised fine-tuning; dropout also sits in its base."""
    model = llama()
    if dropout:
        for layer in model.model.layers:
            layer.mlp.act_fn = nn.Sequential(layer.mlp.act_fn, nn.Dropout(dropout))
    network = attach(model, AdapterSpec(trains="adapter", rank=4, alpha=8.0, dropout=dropout)).to(dtype)
    if checkpointing:
        prepare_layers(network, Execution("full"))
    randomize(network)
    return network


def pair(index: int, *, swapped: bool = False) -> Sample:
    """Random tokens, the same ones for an index; swapped, the rejected completion takes the chosen one's place."""
    generator = np.random.default_rng(index)
    sizes = generator.integers(2, 9, 3)
    prompt, *completions = (generator.integers(0, VOCABULARY, size) for size in sizes)
    if swapped:
        completions.reverse()
    ids = np.concatenate([prompt, *completions])
    return Sample(ids, np.arange(len(ids)) >= len(prompt), (len(prompt), len(prompt) + len(completions[0])))


def pairs(*indices: int, swapped: bool = False) -> MicroBatch:
    return pack([pair(index, swapped=swapped) for index in indices], indices)


def step_of(*micros: MicroBatch, step: int = 0) -> StepBatch:
    supervised = sum(len(micro.rows) for micro in micros)
    num_pairs = sum(len(micro.samples) for micro in micros)
    return StepBatch(step, 0, list(micros), supervised, num_pairs, sum(micro.num_tokens for micro in micros))


def dpo(network: nn.Module, reference: FrozenAdapter | None = None, **options: Any) -> DPOModule:
    """Return the module with what it starts from as its reference, unless another one is given."""
    options = {"optim": ADAMW, "num_steps": 3, "head_chunk_tokens": 7} | options
    return DPOModule(network, reference=reference or FrozenAdapter(network, snapshot(network)), **options)


def moved_reference(network: nn.Module, distance: float = 0.05) -> FrozenAdapter:
    """Return a reference that the policy does not start from."""
    generator = torch.Generator().manual_seed(8)
    values = snapshot(network)
    noise = {n: torch.randn(v.shape, generator=generator).to(v.dtype) for n, v in values.items()}
    return FrozenAdapter(network, {name: value + distance * noise[name] for name, value in values.items()})


class Taken:
    """One step's loss, metrics and gradients, without an update."""

    def __init__(self, module: DPOModule, *micros: MicroBatch) -> None:
        module.network.zero_grad()
        batch, ratios = step_of(*micros), Ratios(module.metric_names, module.device)
        self.shares = []
        for micro in micros:
            share = module.micro_loss(micro, batch, ratios)
            share.backward()
            self.shares.append(share.item())
        self.loss, self.metrics = sum(self.shares), ratios.means()
        self.gradients = {name: p.grad.clone() for name, p in trainable(module.network).items() if p.grad is not None}


def close(left: Taken, right: Taken) -> None:
    assert left.loss == pytest.approx(right.loss, abs=EXACT)
    assert left.metrics == pytest.approx(right.metrics, abs=EXACT)
    assert left.gradients.keys() == right.gradients.keys()
    for name, expected in right.gradients.items():
        torch.testing.assert_close(left.gradients[name], expected, rtol=0, atol=EXACT)


def stored_by(module: DPOModule, *rows: int) -> Tensor:
    """Reference values of these rows as a store holds them; others are unknown."""
    values = torch.full((max(rows) + 3, 2), math.nan, dtype=torch.float64)
    for row in rows:
        values[row] = module.reference_logps(pairs(row)).double()
    return values


class Note(pl.Callback):
    """Remember every step's result, and look at the module after each."""

    def __init__(self, look: Callable[[Any], None] | None = None) -> None:
        self.results: list[StepResult] = []
        self.look = look

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.results.append(pl_module.last)
        if self.look is not None:
            self.look(pl_module)


def fit(
    module: StepModule,
    folder: Path,
    steps: list[StepBatch],
    *,
    val: list[MicroBatch] | None = None,
    look: Callable[[Any], None] | None = None,
    plugins: list[Any] | None = None,
) -> list[StepResult]:
    """Train for these steps; ``val`` is looked at before the first and after the last."""
    note = Note(look)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=len(steps), max_epochs=1, logger=False, callbacks=[note],
        default_root_dir=str(folder), enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=-1 if val else 0, val_check_interval=len(steps), check_val_every_n_epoch=None, plugins=plugins,
    )  # fmt: skip
    trainer.fit(
        module,
        DataLoader(steps, batch_size=None),  # type: ignore[arg-type]
        DataLoader(val, batch_size=None) if val else None,  # type: ignore[arg-type]
    )
    return note.results
