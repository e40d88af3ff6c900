"""How far two ways to the same numbers are apart, and what a broken way must show: a hundred times what is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fine_tune.models.adapter import trainable

FACTOR = 100


class Step(NamedTuple):
    """What a way to a step gave: its values (a loss, or many) and the gradient of their sum, flat."""

    values: Tensor
    gradients: Tensor


def step(network: nn.Module, values: Callable[[], Tensor]) -> Step:
    """Values and the gradient of their sum in everything that trains; what no value depends on has a gradient of 0."""
    network.zero_grad()
    found = values()
    found.sum().backward()
    slopes = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable(network).values()]
    return Step(found.detach().clone(), torch.cat([slope.flatten() for slope in slopes]))


def slopes_of(values: Callable[..., Tensor], *leaves: Tensor) -> Step:
    """The same in tensors instead of a network."""
    own = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    found = values(*own)
    slopes = torch.autograd.grad(found.sum(), own)
    return Step(found.detach().clone(), torch.cat([slope.flatten() for slope in slopes]))


def distance(found: Tensor, right: Tensor) -> float:
    """The largest difference, relative to the largest number that is right; what is not finite is infinitely far."""
    assert found.shape == right.shape
    if not right.numel():
        return 0.0
    scale = right.double().abs().max().item() or 1.0
    far = (found.double() - right.double()).abs().max().item() / scale
    return far if math.isfinite(far) else math.inf


def same(found: Step, right: Step, tolerance: float) -> None:
    """Values and gradients agree."""
    for name, mine, theirs in zip(Step._fields, found, right, strict=True):
        far = distance(mine, theirs)
        assert far <= tolerance, f"{name} are {far:.3g} apart (allowed {tolerance:g})"


def exceeds(broken: Step | Tensor, right: Step | Tensor, tolerance: float) -> None:
    """A control: each part of what is broken is at least a hundred tolerances away, and away at all."""
    pairs = [(broken, right)] if isinstance(broken, Tensor) else list(zip(broken, right, strict=True))
    for name, (mine, theirs) in zip(Step._fields, pairs, strict=False):
        assert isinstance(theirs, Tensor)
        far = distance(mine, theirs)
        print(f"control: {name} are {far:.3g} apart, allowed {tolerance:g}")
        assert far >= FACTOR * tolerance
        assert far > 0, f"the control's {name} are right"
