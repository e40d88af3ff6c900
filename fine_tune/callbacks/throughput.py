"""Speed, hardware use and memory of training: real tokens only, previews and validation left out."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from fine_tune.device import leave_room, memory_limit
from fine_tune.evaluation.flops import FlopModel, peak_flops
from fine_tune.modules.optim import paged_bytes
from fine_tune.modules.step import stepping


class Throughput(pl.Callback):
    """Count tokens, samples, floating-point operations and seconds of every optimizer step, and hold the memory limit.

    State of a paged optimizer counts against the limit from the first update on, which makes it.

    Args:
        peak_tflops: Dense half-precision peak of the device in TFLOP/s for MFU; None looks the device up, and MFU is
            null where it is unknown.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        self.peak = None if peak_tflops is None else peak_tflops * 1e12
        self.totals = {"tokens": 0, "supervised": 0, "samples": 0, "steps": 0, "flops": 0.0, "seconds": 0.0}
        self.earlier = dict(self.totals)
        self.paged = 0
        self.limit: int | None = None
        self._first_laps: list[tuple[float, int]] = []

    def state_dict(self) -> dict[str, Any]:
        """Return totals of the whole run so far, for a checkpoint."""
        return dict(self.totals)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from a checkpoint's totals."""
        self.totals = dict(state_dict)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepare the operation count of this model and start the clock."""
        self.flops = FlopModel.of(stepping(pl_module).network)
        device = trainer.strategy.root_device
        if self.peak is None:
            self.peak = peak_flops(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.limit = memory_limit(device)
        stepping(pl_module).clock.restart()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Close the step's lap."""
        self._count_paged(trainer)
        seconds = stepping(pl_module).clock.lap()
        result = stepping(pl_module).last
        spans = [span for micro in batch.micro_batches for span in micro.segments.spans]
        # Lengths of other ranks are not known here; their tokens count as if distributed alike.
        share = result.num_tokens / max(1, sum(span.length for span in spans))
        extra = stepping(pl_module).extra_forwards
        flops = self.flops.step(spans, result.num_supervised / share, extra_forwards=extra) * share
        done = {
            "tokens": result.num_tokens,
            "supervised": result.num_supervised,
            "samples": result.num_samples,
            "steps": 1,
        }
        for key, value in (*done.items(), ("flops", flops), ("seconds", seconds)):
            self.totals[key] += value
        stepping(pl_module).extra_metrics = {
            "tokens_per_second": result.num_tokens / seconds,
            "samples_per_second": result.num_samples / seconds,
            "step_seconds": seconds,
            "mfu": self._mfu(flops, seconds, trainer.world_size),
        }

    def _count_paged(self, trainer: pl.Trainer) -> None:
        """Count a paged optimizer's state as soon as there is any: a loss scaler may skip the first updates."""
        if self.paged == 0 and any(getattr(one, "is_paged", False) for one in trainer.optimizers):
            self.paged = sum(paged_bytes(one) for one in trainer.optimizers)
            leave_room(trainer.strategy.root_device, self.paged)

    def _mfu(self, flops: float, seconds: float, devices: int) -> float | None:
        return None if self.peak is None else flops / seconds / (self.peak * devices)

    def summary(self, device: torch.device, devices: int = 1) -> dict[str, Any]:
        """Return the run's figures for summary.json."""
        total, seconds = self.totals, max(self.totals["seconds"], 1e-9)
        cuda = device.type == "cuda"
        return {
            "total_flops": total["flops"],
            "train_seconds": total["seconds"],
            "samples_per_second": total["samples"] / seconds,
            "tokens_per_second": total["tokens"] / seconds,
            "supervised_tokens_per_second": total["supervised"] / seconds,
            "mfu": self._mfu(total["flops"], seconds, devices),
            "peak_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9 if cuda else None,
            "reserved_memory_gb": torch.cuda.max_memory_reserved(device) / 1e9 if cuda else None,
            "host_paged_gb": self.paged / 1e9 if cuda else None,
            "memory_limit_gb": None if self.limit is None else round(self.limit / 1e9, 6),
        }
