"""metrics.jsonl: one line per optimizer step, the truth that every tracker mirrors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from fine_tune.modules.step import stepping
from fine_tune.storage import append_text, finite, read_lines, write_text
from fine_tune.tracking.context import numbers_of


class MetricsWriter(pl.Callback):
    """Write each step's metrics to a file and hand them to the trackers.

    A step's line is held back until a validation that belongs to it has ended, so ``val/loss`` joins it.

    Args:
        path: The run's metrics.jsonl.
        first_step: Steps already done; later lines of an interrupted run are cut off.
        loss_counts: The key that counts what the loss is a mean over: ``supervised_tokens``, or ``samples``.

    Attributes:
        val_metrics: What each validation found, by step, under the names of the file.
        train_losses: Each step's loss, and how much it is a mean over.
    """

    def __init__(self, path: Path, *, first_step: int = 0, loss_counts: str = "supervised_tokens") -> None:
        self.path, self.first_step, self.loss_counts = path, first_step, loss_counts
        self.val_metrics: dict[int, dict[str, float]] = {}
        self.train_losses: list[tuple[float, int]] = []
        self.grad_norms: list[float] = []
        self._pending: dict[str, Any] | None = None
        self._keep_lines()

    def _keep_lines(self) -> None:
        lines = read_lines(self.path, up_to_step=self.first_step) if self.first_step else []
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        for line in lines:
            if "val/loss" in line:
                self.val_metrics[line["step"]] = {key: line[key] for key in line if key.startswith("val/")}
            if "train/loss" in line:
                self._remember(line)

    def _remember(self, line: dict[str, Any]) -> None:
        self.train_losses.append((line["train/loss"], line[self.loss_counts]))
        if line["grad_norm"] is not None:
            self.grad_norms.append(line["grad_norm"])

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Write this step's line, or hold it for the validation that follows."""
        self._flush(trainer)
        result = stepping(pl_module).last
        self._pending = {
            "step": result.step,
            "epoch": result.epoch,
            "train/loss": result.loss,
            **{f"train/{name}": value for name, value in result.metrics.items()},
            "learning_rate": result.learning_rate,
            "grad_norm": finite(result.grad_norm),
            "samples": result.num_samples,
            "tokens": result.num_tokens,
            "supervised_tokens": result.num_supervised,
            **stepping(pl_module).extra_metrics,
        }
        self._remember(self._pending)
        # Before the step's checkpoint, which the validation's line also precedes: a kill then loses neither alone.
        if not stepping(pl_module).validates_after(result.step):
            self._flush(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Join what validation found to its step's line; before training it is step 0's own."""
        found = {f"val/{name}": value for name, value in stepping(pl_module).val_metrics.items()}
        if not found:
            return
        line = self._pending or {"step": stepping(pl_module).step}
        self.val_metrics[line["step"]] = found
        self._pending = {**line, **found}
        self._flush(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the last line."""
        self._flush(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Keep the line of a step that was finished before something failed."""
        self._flush(trainer)

    def _flush(self, trainer: pl.Trainer) -> None:
        line, self._pending = self._pending, None
        if line is None or not trainer.is_global_zero:
            return
        line = finite(line)
        append_text(self.path, json.dumps(line) + "\n")
        for logger in trainer.loggers:
            logger.log_metrics(numbers_of(line), step=line["step"])
