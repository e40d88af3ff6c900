"""The callback that runs the checklist: before the first step, around the first update, and after the second."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import rich

from fine_tune.checklist.item import Item, as_plain, as_table, refuse_failed
from fine_tune.checklist.masks import masks_item
from fine_tune.checklist.passes import Passes, computed_reference
from fine_tune.checklist.weights import WeightWatch
from fine_tune.data.module import PackedDataModule, StepDataset, pack_rows
from fine_tune.modules.dpo import DPOModule
from fine_tune.modules.step import StepModule, stepping
from fine_tune.packing.batches import MicroBatch, Sample
from fine_tune.rng import untouched_rng
from fine_tune.storage import write_json
from fine_tune.text.template import ChatTemplate
from fine_tune.training_data import fullest_step

FILE = "checklist.json"
# Rows whose masks are decoded; updates after which every weight that trains has moved.
ROWS, UPDATES = 16, 2
# On a CPU a whole micro-batch takes seconds: some of its rows show the same.
CPU_TOKENS = 384


@dataclass(frozen=True)
class Reading:
    """What turns token ids back into text."""

    tokenizer: Any
    template: ChatTemplate


class FirstSteps(pl.Callback):
    """Print and keep what a run proves about itself, and stop it where something does not hold.

    Nothing that it does changes the run: gradients, random states and the clock are as without it.

    Args:
        folder: The run's folder, for ``checklist.json``.
        reading: Tokenizer and template.
        before: Items that were checked already.
        batch_kind: ``data.batch`` of the run; documents have no answers to look for.
    """

    def __init__(self, folder: Path, reading: Reading, *, before: Sequence[Item], batch_kind: str) -> None:
        self.folder, self.reading, self.batch_kind = folder, reading, batch_kind
        self.items = list(before)
        self.seconds = 0.0
        self._watch: WeightWatch | None = None
        self._updates = 0
        self._shown = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check what can be checked before the first step."""
        module = stepping(pl_module)
        with module.clock.paused(), untouched_rng():
            started = time.perf_counter()
            self.items += self._before_training(trainer, module)
            self._watch = WeightWatch(module.network)
            self.seconds += time.perf_counter() - started
        self._tell(trainer, "before the first step")

    def _before_training(self, trainer: pl.Trainer, module: StepModule) -> list[Item]:
        data = cast(PackedDataModule, getattr(trainer, "datamodule"))  # noqa: B009 - set by Lightning without a declaration
        steps = StepDataset(data.prepared.train, data.planner, num_steps=data.num_steps, rank=trainer.global_rank)
        number, _ = fullest_step(data, first=module.step, rank=trainer.global_rank)
        first, fullest = steps[module.step], steps[number]
        found = [self._masks(data, [row for micro in first.micro_batches for row in micro.samples])]
        if not first.micro_batches:
            return found
        passes = Passes(module, lambda: cast(AbstractContextManager[None], trainer.precision_plugin.train_step_context()))
        with computed_reference(module):
            largest = max(first.micro_batches, key=lambda micro: micro.num_tokens)
            if module.device.type == "cpu":
                largest = _some_rows(data, largest)
            found.append(passes.division(largest.to(module.device), first))
            full = max(fullest.micro_batches, key=lambda micro: micro.num_tokens, default=largest)
            found.append(passes.fits(full.to(module.device), fullest))
        return found

    def _masks(self, data: PackedDataModule, rows: Sequence[int]) -> Item:
        if self.batch_kind == "documents":
            return Item("masks", None, "documents: every token is learned")
        table = data.prepared.train
        samples = [Sample(*table.row(row), table.branches(row)) for row in rows[:ROWS]]
        return masks_item(samples, self.reading.tokenizer, self.reading.template)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Look at the first gradients: those of B before the first update, those of A once B is not zero."""
        if self._watch is not None:
            self._watch.look_at_gradients()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Count updates that move something; after the second, judge what moved."""
        if self._watch is None:
            return
        last = stepping(pl_module).last
        self._updates += int(not last.skipped and last.learning_rate > 0)
        if self._updates >= UPDATES:
            self._finish(trainer, stepping(pl_module))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell what is known of a run of one step."""
        if self._watch is not None:
            self._finish(trainer, stepping(pl_module))

    def _finish(self, trainer: pl.Trainer, module: StepModule) -> None:
        assert self._watch is not None
        with module.clock.paused():
            started = time.perf_counter()
            if isinstance(module, DPOModule) and module.gate is not None and module.gate.seen is not None:
                self.items.append(Item("reference", True, module.gate.seen))
            self.items += [] if self._watch.gradients is None else [self._watch.gradients]
            if self._updates >= UPDATES:
                self.items.append(self._watch.changed())
            self.items.append(self._watch.unchanged())
            self.seconds += time.perf_counter() - started
        self._watch = None
        self._tell(trainer, f"after {self._updates} updates")

    def _tell(self, trainer: pl.Trainer, when: str) -> None:
        new, self._shown = self.items[self._shown :], len(self.items)
        if trainer.is_global_zero:
            write_json(self.folder / FILE, {"seconds": self.seconds, "items": as_plain(self.items)})
            rich.get_console().print(f"checklist, {when} ({self.seconds:.1f} s)", as_table(new))
        refuse_failed(new)


def _some_rows(data: PackedDataModule, micro: MicroBatch) -> MicroBatch:
    """Take the first rows of a micro-batch, two at least where there are two."""
    ends = data.prepared.train.lengths[list(micro.samples)].cumsum()
    count = max(2, int((ends <= CPU_TOKENS).sum()))
    return pack_rows(data.prepared.train, micro.samples[:count])
