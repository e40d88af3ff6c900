"""What ``trainer.speed`` stands for, and what a device can do of it."""

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
KEYS = tuple(Execution.__dataclass_fields__)


def chosen_execution(trainer: Mapping[str, Any], plan: DevicePlan) -> Execution:
    """Take the named speed, and on top of it the keys that are set by themselves.

    ``auto`` is ``plain`` on a CPU, where compiling takes longer than most runs, and on GPUs older than Ampere, whose attention
    cannot be compiled in one piece; elsewhere ``balanced``.
    """
    name = trainer["speed"]
    if name == "auto":
        name = "balanced" if plan.is_ampere else "plain"
    own = {key: trainer[key] for key in KEYS if trainer[key] is not None}
    return replace(SPEEDS[name], **own)
