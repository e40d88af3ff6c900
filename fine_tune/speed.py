"""What ``trainer.speed`` stands for, and which speeds a device can run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fine_tune.device import DevicePlan
from fine_tune.models.execution import Execution

SPEEDS = {
    "plain": Execution(),
    "fast": Execution(compile=True, fused_lora=True),
    "balanced": Execution("selective", compile=True, fused_lora=True),
    "lean": Execution("full", offload=True, compile=True, fused_lora=True),
}
# What auto may choose on cards of that generation and later, the fastest first.
AMPERE = ("balanced", "lean")
KEYS = tuple(Execution.__dataclass_fields__)


def chosen_execution(trainer: Mapping[str, Any]) -> Execution:
    """Take the named speed, and on top of it the keys that are set by themselves."""
    own = {key: trainer[key] for key in KEYS if trainer[key] is not None}
    return replace(SPEEDS[trainer["speed"]], **own)


def speeds_for(plan: DevicePlan) -> tuple[str, ...]:
    """Name what ``auto`` may choose on a device, the fastest first.

    Plain on a CPU, where compiling takes longer than most runs, and on GPUs older than Ampere, whose attention cannot be
    compiled in one piece. Elsewhere the compiled ones: ``fast`` is not among them, as it takes a third more memory than
    ``balanced`` and was no faster (docs/performance.md).
    """
    return AMPERE if plan.is_ampere else ("plain",)
