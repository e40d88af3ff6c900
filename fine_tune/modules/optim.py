"""Parameter groups and the learning-rate schedule of a run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from fine_tune.errors import ConfigError


@dataclass(frozen=True)
class OptimSpec:
    """How the weights move.

    ``build`` makes the optimizer from parameter groups and keyword arguments. ``lr`` is the peak; ``warmup_share`` a
    share of all optimizer steps, rounded up; ``max_grad_norm`` a global L2 norm, None for no clipping.
    """

    build: Callable[..., Optimizer]
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    schedule: str = "cosine"
    warmup_share: float = 0.03
    schedule_options: dict[str, Any] = field(default_factory=dict)


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Split what trains into decayed matrices and undecayed vectors (norms, biases, DoRA magnitudes).

    Source: decay for matrices only, as in Loshchilov and Hutter 2019 (arXiv:1711.05101) applied by GPT-2's successors.
    """
    named = list(parameters)
    matrices = [p for _, p in named if p.ndim >= 2]
    vectors = [p for _, p in named if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(spec: OptimSpec, parameters: Iterable[tuple[str, nn.Parameter]], *, scaled: bool) -> Optimizer:
    """Make the optimizer; the fused kernel is used where torch has it and no loss scaler is in the way."""
    groups = parameter_groups(parameters, spec.weight_decay)
    options: dict[str, Any] = {"lr": spec.lr, "betas": spec.betas, "eps": spec.eps, "weight_decay": spec.weight_decay}
    first: nn.Parameter = groups[0]["params"][0]
    if "fused" in inspect.signature(spec.build).parameters and first.is_cuda and not scaled:
        options["fused"] = True
    return spec.build(groups, **options)


def paged_bytes(optimizer: Optimizer) -> int:
    """Count the optimizer state in memory that the driver moves between host and device: no allocator of torch knows it."""
    tensors = (value for state in optimizer.state.values() for value in state.values())
    return sum(tensor.nbytes for tensor in tensors if getattr(tensor, "is_paged", False))


def build_schedule(spec: OptimSpec, optimizer: Optimizer, num_steps: int) -> LRScheduler:
    """Make the schedule over the run's optimizer steps.

    It is a function of the step and of ``num_steps`` alone: a run that is resumed with more steps follows, from there
    on, the schedule of the longer run.

    Raises:
        ConfigError: transformers does not know the schedule, or refuses its options.
    """
    warmup = math.ceil(round(spec.warmup_share * num_steps, 6))
    try:
        schedule: LRScheduler = get_scheduler(
            spec.schedule,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=num_steps,
            scheduler_specific_kwargs=dict(spec.schedule_options) or None,
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"optim.schedule={spec.schedule}: {error}") from error
    return schedule


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float | None) -> torch.Tensor:
    """Scale gradients down to a global L2 norm and return the norm they had, a float32 scalar on their device."""
    found = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in found if p.grad is not None])
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(found, max_norm, norm)
    return norm
