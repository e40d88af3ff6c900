"""Loss and gradients of one optimizer step, its rows dealt out to micro-batches in any way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fine_tune.device import DevicePlan
from fine_tune.models.adapter import causal_lm, trainable
from fine_tune.models.attention import PACKED
from fine_tune.models.base import set_attention
from fine_tune.modules.ratios import Ratios
from fine_tune.modules.step import StepModule
from fine_tune.packing.batches import MicroBatch, Sample, StepBatch, pack
from fine_tune.packing.halves import unpack
from fine_tune.packing.segments import Segments

# fp16's gradients vanish below 6e-8; a training run has a loss scaler, which finds its factor by itself.
FP16_SCALE = 1024.0
# A tensor whose gradient is smaller than this share of the largest one's is judged as if it had that much.
SMALLEST = 1e-4


@dataclass(frozen=True)
class Taken:
    """What a step gave: its loss, and the gradient of everything that trains, on the CPU."""

    loss: float
    gradients: Mapping[str, Tensor]


@dataclass(frozen=True)
class Taker:
    """Takes steps of a module without an update."""

    module: StepModule
    plan: DevicePlan

    def take(self, batch: StepBatch, micros: Sequence[MicroBatch], *, mean_of_means: bool = False) -> Taken:
        """Run forward and backward of a step.

        Args:
            batch: The step, whose counts are the loss's denominator.
            micros: Its rows; all of them, or a rank's share.
            mean_of_means: A mistake made on purpose: every micro-batch is divided by its own count, and so is the sum.
        """
        trained = trainable(self.module.network)
        for parameter in trained.values():
            parameter.grad = None
        half = self.plan.precision == "16-mixed"
        scale, loss = FP16_SCALE if half else 1.0, 0.0
        for micro in micros:
            counts = _own_counts(batch, micro) if mean_of_means else batch
            with torch.autocast(self.plan.device.type, self.plan.compute_dtype) if self.mixed else nullcontext():
                share = self.module.micro_loss(
                    micro.to(self.plan.device), counts, Ratios(self.module.metric_names, self.plan.device)
                )
            share = share / len(micros) if mean_of_means else share
            (share * scale).backward()
            loss += share.item()
        found = {name: _read(p, scale) for name, p in trained.items()}
        for parameter in trained.values():
            parameter.grad = None
        return Taken(loss, found)

    @property
    def mixed(self) -> bool:
        """Products are computed in half precision."""
        return self.plan.precision != "32-true"

    def take_plain(self, batch: StepBatch, micros: Sequence[MicroBatch]) -> Taken:
        """Run rows that are alone in their micro-batches through the model's own attention, which knows of no packing."""
        inner = causal_lm(self.module.network)
        set_attention(inner, "sdpa")
        try:
            return self.take(batch, micros)
        finally:
            set_attention(inner, PACKED)


def _own_counts(batch: StepBatch, micro: MicroBatch) -> StepBatch:
    return replace(batch, num_supervised=len(micro.rows), num_samples=len(micro.samples), num_tokens=micro.num_tokens)


def _read(parameter: torch.nn.Parameter, scale: float) -> Tensor:
    grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return (grad.detach() / scale if scale != 1.0 else grad.detach()).to("cpu", copy=True)


def whole(micros: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Lay all rows into one micro-batch."""
    return [_packed(_rows(micros))]


def alone(micros: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Give every row a micro-batch of its own."""
    return [_packed([row]) for row in _rows(micros)]


def uneven(micros: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Put one row apart from the others, so that a mean of means weighs it far too much."""
    first, *others = alone(micros)
    rest = [_packed([row for row in _rows([micro]) if row[0] != first.samples[0]]) for micro in micros if _others(micro, first)]
    return [first, *(rest or others)]


def as_two_sequences(micros: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Lay both completions of each pair behind a prompt of their own: no prefix is shared."""
    found = []
    for index, row in _rows(micros):
        prompt, middle = row.branches
        ids, mask = row.input_ids, row.loss_mask
        sides = [[*range(middle)], [*range(prompt), *range(middle, len(ids))]]
        found.append(pack([Sample(ids[side], mask[side]) for side in sides], (index,)))
    return found


def leaking(micros: Sequence[MicroBatch]) -> list[MicroBatch]:
    """A mistake made on purpose: rows of a micro-batch see those before them."""
    return [replace(micro, segments=Segments.of([micro.num_tokens])) for micro in micros]


def _others(micro: MicroBatch, first: MicroBatch) -> bool:
    return any(index != first.samples[0] for index in micro.samples)


def _rows(micros: Sequence[MicroBatch]) -> list[tuple[int, Sample]]:
    return [row for micro in micros for row in zip(micro.samples, unpack(micro), strict=True)]


def _packed(rows: Sequence[tuple[int, Sample]]) -> MicroBatch:
    return pack([row for _, row in rows], [index for index, _ in rows])


def apart(left: Taken, right: Taken) -> tuple[dict[str, float], str]:
    """Return how far two results are apart: losses, the gradient that differs most, all of them together; and which that is."""
    loss = abs(left.loss - right.loss) / max(abs(left.loss), 1e-12)
    norms = {name: grad.double().norm().item() for name, grad in left.gradients.items()}
    least = SMALLEST * max(norms.values(), default=0.0)
    distances = {name: (grad.double() - right.gradients[name].double()).norm().item() for name, grad in left.gradients.items()}
    gaps = {name: distance / max(norms[name], least, 1e-300) for name, distance in distances.items()}
    worst = max(gaps, key=lambda name: gaps[name])
    together = math.hypot(*distances.values()) / max(math.hypot(*norms.values()), 1e-300)
    return {"loss": loss, "gradients": gaps[worst], "together": together}, worst if gaps[worst] else ""
