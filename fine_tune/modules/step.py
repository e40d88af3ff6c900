"""What every objective shares: one training step is one optimizer step, exact, guarded and counted."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from fine_tune.errors import NonFiniteError
from fine_tune.models.adapter import trainable
from fine_tune.modules.clock import Stopwatch
from fine_tune.modules.optim import OptimSpec, build_optimizer, build_schedule, clip_grad_norm
from fine_tune.modules.parallel import share_start, sum_gradients, sum_scalars
from fine_tune.modules.ratios import Ratios
from fine_tune.modules.replay import Replay
from fine_tune.packing.batches import MicroBatch, StepBatch


@dataclass
class StepResult:
    """What one optimizer step was: the mean loss before the update, gradient norm, counts, and the objective's metrics."""

    step: int
    epoch: int
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    num_supervised: int
    num_samples: int
    skipped: bool
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class _Backward:
    """A step after its last backward: loss and sums of its metrics on the device; with the gradient norm, ``found``."""

    batch: StepBatch
    sums: Tensor
    found: list[float] = field(default_factory=list)


class StepModule(pl.LightningModule):
    """Run optimizer steps over packed micro-batches; a subclass says what a micro-batch costs.

    Args:
        network: The adapted model, packed attention on.
        optim: Optimizer, clipping and schedule.
        num_steps: Optimizer steps of the whole run; the schedule ends there.
        max_skipped_steps: Loss-scaler skips in a row that are still normal (fp16 only).
        val_every_n_steps: Optimizer steps between validations besides the first and last; None for no others, 0 for none.

    Attributes:
        accepts: Values of ``data.batch`` that it can train on.
        loss_counts: What its loss is a mean over, as the key of metrics.jsonl that counts it.
        loss_unit: What its loss is measured in, for people.
        has_perplexity: Its loss is the negative log-likelihood of a token.
        metric_names: Further means it reports, of training steps and of validations.
        val_metric_names: Means it reports of validations alone.
        extra_forwards: Forward passes without a backward of each token, for the count of operations.
        step: Optimizer steps done, over all processes that worked on this run.
        skipped_steps: Updates that a loss scaler refused.
        clock: Training time; whatever is no training pauses it.
        last: The step just done.
        val_metrics: What the latest validation found, ``loss`` among it.
        extra_metrics: Further numbers for this step's line of metrics.
        answerer: Answers prompts with this network, for previews.
        replay: Does a step again in smaller micro-batches where memory ran out.
        known_start: What the validation before the first step finds, where it is known already; it is then not computed.
    """

    accepts: ClassVar[tuple[str, ...]]
    loss_counts: ClassVar[str]
    loss_unit: ClassVar[str]
    has_perplexity: ClassVar[bool] = False
    metric_names: ClassVar[tuple[str, ...]] = ()
    val_metric_names: ClassVar[tuple[str, ...]] = ()
    extra_forwards: int = 0

    def __init__(
        self,
        network: nn.Module,
        *,
        optim: OptimSpec,
        num_steps: int,
        max_skipped_steps: int = 10,
        val_every_n_steps: int | None = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = network
        self.optim, self.num_steps = optim, num_steps
        self.max_skipped_steps, self.val_every_n_steps = max_skipped_steps, val_every_n_steps
        self.clock = Stopwatch()
        self.extra_metrics: dict[str, float | None] = {}
        self.answerer: Any = None
        self.val_metrics: dict[str, float] = {}
        self.known_start: dict[str, float] | None = None
        self.replay = Replay()
        self.step = 0
        self.skipped_steps = 0
        self._skipped_in_row = 0
        self.last: StepResult
        self._trained = list(trainable(network).values())
        self._ratios: Ratios
        self._done: _Backward

    @abstractmethod
    def micro_loss(self, micro: MicroBatch, batch: StepBatch, ratios: Ratios) -> Tensor:
        """Return one micro-batch's share of the step's mean loss, a scalar, and add its metrics to ``ratios``."""

    @abstractmethod
    def validation_step(self, batch: MicroBatch, batch_idx: int) -> None:
        """Add a validation micro-batch to ``self._ratios``, ``loss`` among it."""

    def before_attempt(self) -> None:
        """Forget what an attempt at this step has noted, which memory that ran out has cut short."""

    def before_update(self, batch: StepBatch) -> None:
        """Look at a step after its last backward; an error raised here leaves the weights as they were."""

    @property
    def val_loss(self) -> float | None:
        """The latest validation loss."""
        return self.val_metrics.get("loss")

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Optimizer and schedule; the schedule is advanced by the step itself, once per update."""
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        optimizer = build_optimizer(self.optim, trainable(self.network).items(), scaled=scaled)
        schedule = build_schedule(self.optim, optimizer, self.num_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def cpu(self) -> StepModule:
        """Stay on the device: Lightning moves a module to the CPU when training ends, but quantised layers cannot move.

        The answers after training, too, are to be made where training ran.
        """
        return self

    def on_fit_start(self) -> None:
        """Start all ranks from the same values."""
        share_start(self._trained)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Copy behind what the device is doing; Lightning would wait for it."""
        return batch.to(device, non_blocking=True)

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """Backward every micro-batch, in halves where memory runs out; then clip, update and advance the schedule once."""
        ratios = Ratios(self.metric_names, self.device)
        loss = torch.zeros(1, device=self.device, dtype=torch.float64)

        def begin() -> None:
            ratios.sums.zero_()
            loss.zero_()
            self.before_attempt()
            for parameter in self._trained:
                parameter.grad = None

        def backward(micro: MicroBatch) -> None:
            share = self.micro_loss(micro, batch, ratios)
            self.manual_backward(share)
            loss.add_(share.detach())

        self.replay.run(batch.micro_batches, begin=begin, backward=backward, device=self.device)
        sum_gradients(self._trained)
        self._done = _Backward(batch, sum_scalars(torch.cat([loss, ratios.sums.flatten()])))
        self._update(batch, ratios)

    def _update(self, batch: StepBatch, ratios: Ratios) -> None:
        optimizer = self.optimizers()
        rate = optimizer.param_groups[0]["lr"]  # type: ignore[union-attr]
        scale = self._loss_scale()
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]
        skipped = scale is not None and (self._loss_scale() or 0.0) < scale
        self._count(skipped, batch)
        self.step += 1
        loss, norm, *sums = self._done.found
        self.last = StepResult(
            self.step, batch.epoch, loss, norm, rate, batch.num_tokens, batch.num_supervised,
            batch.num_samples, skipped, ratios.quotients(sums),
        )  # fmt: skip

    def _count(self, skipped: bool, batch: StepBatch) -> None:
        if not skipped:
            self._skipped_in_row = 0
            self.lr_schedulers().step()  # type: ignore[union-attr]
            return
        self.skipped_steps += 1
        self._skipped_in_row += 1
        if self._skipped_in_row > self.max_skipped_steps:
            raise NonFiniteError(
                self._not_finite("gradient", float("inf"), batch)
                + f" The loss scaler skipped {self._skipped_in_row} steps in a row (trainer.max_skipped_steps="
                f"{self.max_skipped_steps}); precision bf16-mixed or a lower optim.lr may help."
            )

    def _loss_scale(self) -> float | None:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return None if scaler is None else float(scaler.get_scale())

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip after any loss scaling is undone, and stop before anything non-finite reaches the weights.

        Here, and nowhere else in a step, the host waits for the device: for all figures at once, and before the update is
        queued, so that what follows on the host runs beside it.
        """
        norm = clip_grad_norm(self._trained, self.optim.max_grad_norm).double().reshape(1)
        batch, sums = self._done.batch, self._done.sums
        self._done.found = torch.cat([sums[:1], norm.to(sums.device), sums[1:]]).tolist()
        loss, size = self._done.found[:2]
        if not math.isfinite(loss):
            raise NonFiniteError(self._not_finite("loss", loss, batch))
        self.before_update(batch)
        # With a scaler an infinite gradient is ordinary: the scaler skips that update by itself.
        if self._loss_scale() is None and not math.isfinite(size):
            raise NonFiniteError(self._not_finite("gradient norm", size, batch))

    def _not_finite(self, what: str, value: float, batch: StepBatch) -> str:
        rows = [index for micro in batch.micro_batches for index in micro.samples]
        return (
            f"step {batch.step + 1}: the {what} is {value}; nothing was updated. Training rows of this step: {rows[:32]}. "
            "The last checkpoint is intact: start from it with init_from=<its folder> and a lower optim.lr, or look at these rows."
        )

    def on_validation_start(self) -> None:
        """Leave validation out of the training time."""
        self.clock.pause()

    def on_validation_end(self) -> None:
        """Count training time again."""
        self.clock.proceed()

    def on_validation_epoch_start(self) -> None:
        """Forget earlier sums."""
        self._ratios = Ratios(("loss", *self.metric_names, *self.val_metric_names), self.device)

    def on_validation_epoch_end(self) -> None:
        """Publish the means over all validation rows, also to Lightning, for early stopping on any of them."""
        self.val_metrics = dict(self.known_start or {}) if self.start_is_known else self._ratios.means()
        for name, value in self.val_metrics.items():
            self.log(f"val/{name}", value, logger=False)

    @property
    def start_is_known(self) -> bool:
        """The validation under way is the one before the first step, and its result is known."""
        return self.known_start is not None and self.step == 0

    def validates_after(self, step: int) -> bool:
        """Tell whether a validation follows this optimizer step."""
        if self.val_every_n_steps == 0:
            return False
        return step == self.num_steps or bool(self.val_every_n_steps and step % self.val_every_n_steps == 0)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Ask Lightning for the validation that belongs to the last step."""
        if self.step == self.num_steps:
            self.trainer.should_stop = True


def stepping(module: pl.LightningModule) -> StepModule:
    """View a module as what every objective here is."""
    return cast(StepModule, module)


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return a trainer's callbacks (an attribute that Lightning sets without declaring it)."""
    return cast(list[pl.Callback], cast(Any, trainer).callbacks)
