"""How far two states are apart: nothing only where every bit is the same."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# What differs in its bits alone, such as zeros of two signs, is not the same.
LEAST = sys.float_info.min


class Gap(NamedTuple):
    """The largest relative difference, where it is, and how many tensors and numbers were compared."""

    size: float
    where: str = ""
    compared: int = 0


def gap(left: Any, right: Any, where: str = "") -> Gap:
    """Compare two nests of containers, tensors and numbers.

    A tensor's difference is the norm of the difference over that of the left one. Whatever cannot be subtracted (names,
    shapes, kinds) is infinitely far apart.

    Example:
        >>> gap({"a": [1.0, 2]}, {"a": [1.0, 3]})
        Gap(size=inf, where='a[1]', compared=2)
        >>> gap({"a": [1.0, 2]}, {"a": [1.0, 2]}).size
        0.0
    """
    found = [Gap(size, place, 1) for place, size in _gaps(left, right, where)]
    if not found:
        return Gap(0.0)
    worst = max(found, key=lambda one: one.size)
    return Gap(worst.size, worst.where if worst.size else "", len(found))


def _gaps(left: Any, right: Any, where: str) -> Iterator[tuple[str, float]]:
    if type(left) is not type(right):
        yield where, math.inf
    elif isinstance(left, Mapping):
        if left.keys() != right.keys():
            missing = sorted(str(key) for key in left.keys() ^ right.keys())
            yield f"{where}.{missing[0]}".lstrip("."), math.inf
        for key in left.keys() & right.keys():
            yield from _gaps(left[key], right[key], f"{where}.{key}".lstrip("."))
    elif isinstance(left, Sequence) and not isinstance(left, str):
        if len(left) != len(right):
            yield where, math.inf
        for index, (one, other) in enumerate(zip(left, right, strict=False)):
            yield from _gaps(one, other, f"{where}[{index}]")
    elif isinstance(left, Tensor):
        yield where, tensor_gap(left, right)
    elif isinstance(left, float):
        yield where, number_gap(left, right)
    else:
        yield where, 0.0 if left == right else math.inf


def tensor_gap(left: Tensor, right: Tensor) -> float:
    """Return the norm of the difference, relative to the left one's norm; 0 where every bit is the same."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return math.inf
    if torch.equal(_bits(left), _bits(right)):
        return 0.0
    norm = left.double().norm().item()
    difference = (left.double() - right.double()).norm().item()
    if not (math.isfinite(norm) and math.isfinite(difference)):
        return math.inf
    return max(difference / norm, LEAST) if norm else (math.inf if difference else LEAST)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def number_gap(left: float, right: float, scale: float | None = None) -> float:
    """Return the difference of two numbers, relative to the larger one, or to ``scale``."""
    if left == right and math.copysign(1.0, left) == math.copysign(1.0, right):
        return 0.0
    if math.isnan(left) and math.isnan(right):
        return 0.0
    size = max(abs(left), abs(right), LEAST) if scale is None else max(scale, LEAST)
    found = abs(left - right) / size
    return max(found, LEAST) if math.isfinite(found) else math.inf


def lines_gap(
    left: Sequence[Mapping[str, Any]], right: Sequence[Mapping[str, Any]], *, keys: frozenset[str], only: bool
) -> Gap:
    """Compare lines of metrics, number by number, each relative to the largest of its name.

    Args:
        left: Lines of the one run.
        right: Lines of the other.
        keys: Names of numbers.
        only: Compare these names; else all but these.
    """
    if len(left) != len(right):
        return Gap(math.inf, f"{len(left)} and {len(right)} lines", 0)
    kept = [[{k: v for k, v in line.items() if (k in keys) == only} for line in lines] for lines in (left, right)]
    scales: dict[str, float] = {}
    for line in kept[0]:
        for key, value in line.items():
            if isinstance(value, float) and math.isfinite(value):
                scales[key] = max(scales.get(key, 0.0), abs(value))
    found: list[Gap] = []
    for whole, one, other in zip(left, *kept, strict=True):
        step = f"step {whole.get('step')}"
        if one.keys() != other.keys():
            return Gap(math.inf, f"{step}: {sorted(one.keys() ^ other.keys())[0]}", len(found))
        for key, value in one.items():
            both_float = isinstance(value, float) and isinstance(other[key], float)
            size = number_gap(value, other[key], scales.get(key)) if both_float else 0.0 if value == other[key] else math.inf
            found.append(Gap(size, f"{key} of {step}"))
    worst = max(found, key=lambda one: one.size, default=Gap(0.0))
    return Gap(worst.size, worst.where if worst.size else "", len(found))
