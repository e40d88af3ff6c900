"""Hand what validations found to whoever follows the run."""

from __future__ import annotations

import lightning.pytorch as pl

from fine_tune.callbacks.metrics import MetricsWriter
from fine_tune.watching import Watcher


class Watch(pl.Callback):
    """Tell a watcher of each validation but the last once, those before an interruption first.

    After the last there is nothing left to stop.

    Args:
        watcher: Who is told.
        metrics: What the validations found.
    """

    def __init__(self, watcher: Watcher, metrics: MetricsWriter) -> None:
        self.watcher, self.metrics = watcher, metrics
        self._told: set[int] = set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell of step 0, and of what a resumed run has behind it."""
        self._tell()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        """Tell of the validation after the step before: here nothing of a step is half done."""
        self._tell()

    def _tell(self) -> None:
        for step in sorted(self.metrics.val_metrics.keys() - self._told):
            self._told.add(step)
            self.watcher.validated(step, self.metrics.val_metrics[step])
