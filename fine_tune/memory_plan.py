"""What a run will take on its device, from its config, and the speed and micro-batch that are left to be chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fine_tune.device import DTYPES, DevicePlan
from fine_tune.memory.choice import USABLE, Choice, choose
from fine_tune.memory.estimate import Footprint, Step, Stored, Trained, footprint
from fine_tune.memory.shape import ModelShape, read_shape
from fine_tune.models.execution import Execution
from fine_tune.speed import AMPERE, chosen_execution, speeds_for

AUTO = "auto"
# What a CPU takes, and what any device takes whose memory cannot be planned.
DEFAULT_TOKENS = 4096
# Optimizer state on the device, in bytes per weight; paged states are where the driver puts them.
STATE_BYTES = {"AdamW": 8, "PagedAdamW32bit": 0, "PagedAdamW8bit": 0}


@dataclass(frozen=True)
class Samples:
    """What of the data decides memory: the longest sample, in tokens, and the tokens of a usual optimizer step."""

    longest: int
    per_step: int

    @classmethod
    def of(cls, lengths: Sequence[int], *, global_batch_size: int, num_ranks: int) -> Samples:
        """Take them from the lengths of all samples, for one of ``num_ranks`` devices."""
        mean = sum(lengths) / max(1, len(lengths))
        return cls(int(max(lengths, default=1)), int(mean * global_batch_size / num_ranks) + 1)


@dataclass(frozen=True)
class MemoryPlan:
    """How a run will use its device.

    Attributes:
        speed: Name of the speed, never ``auto``.
        execution: What it stands for, the config's own keys included.
        tokens: Most tokens of a micro-batch.
        footprint: Bytes at the peak; None on a CPU, and where the model's shape cannot be read.
        free: Bytes that were free on the device, None on a CPU.
    """

    speed: str
    execution: Execution
    tokens: int
    footprint: Footprint | None = None
    free: int | None = None

    @property
    def fits(self) -> bool:
        """Nothing says that it will not fit."""
        return self.footprint is None or self.free is None or self.footprint.total <= USABLE * self.free

    def describe(self) -> list[str]:
        """Say what was planned, and where it may not fit; nothing where there was nothing to plan."""
        if self.footprint is None or self.free is None:
            return []
        peak, free = self.footprint.total / 1e9, self.free / 1e9
        lines = [f"memory: trainer.speed={self.speed}, {self.tokens:,} tokens per forward, about {peak:.1f} of {free:.1f} GB"]
        if not self.fits:
            lines.append("note: this may not fit. Lower data.max_seq_len or method.rank, or use method=qlora.")
        return lines

    def settled(self, trainer: Mapping[str, Any]) -> dict[str, Any]:
        """Return the trainer's keys with everything chosen."""
        return {**trainer, "speed": self.speed, "micro_batch_tokens": self.tokens}


def plan_memory(
    cfg: Mapping[str, Any], device: DevicePlan, folder: Path, samples: Samples, *, card: int | None = None
) -> MemoryPlan:
    """Settle ``trainer.speed`` and ``trainer.micro_batch_tokens`` where they are ``auto``, and estimate the peak.

    Args:
        cfg: A checked config.
        device: Where it will run.
        folder: The model's folder.
        samples: What the data asks for.
        card: Bytes of a card of Ampere's generation or later that is not here, to plan for it.
    """
    trainer = cfg["trainer"]
    fixed = None if trainer["micro_batch_tokens"] == AUTO else trainer["micro_batch_tokens"]
    usual = AMPERE if card is not None else speeds_for(device)
    names = usual if trainer["speed"] == AUTO else (trainer["speed"],)
    speeds = {name: chosen_execution({**trainer, "speed": name}) for name in names}
    cuda = device.device.type == "cuda"
    shape = read_shape(folder, trust_remote_code=cfg["model"]["trust_remote_code"]) if cuda else None
    if shape is None:
        return MemoryPlan(names[0], speeds[names[0]], fixed or max(DEFAULT_TOKENS, samples.longest))
    free = card if card is not None else free_memory(device)
    estimate = Estimator.of(cfg, shape, device)
    chosen: Choice = choose(
        speeds, estimate, budget=USABLE * free, longest=samples.longest, per_step=samples.per_step, fixed=fixed
    )
    return MemoryPlan(chosen.speed, speeds[chosen.speed], chosen.tokens, chosen.footprint, free)


def free_memory(plan: DevicePlan) -> int:
    """Bytes that tensors could take now: what no process has, and what this one holds without using it.

    Several processes must choose alike without asking each other: they take the smallest card of the machine, as if empty.
    """
    if plan.num_ranks > 1:
        cards = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
        return int(min(cards))
    free, _ = torch.cuda.mem_get_info(plan.device)
    return int(free + torch.cuda.memory_reserved(plan.device) - torch.cuda.memory_allocated(plan.device))


@dataclass(frozen=True)
class Estimator:
    """The footprint of a config's micro-batches, by execution and tokens."""

    shape: ModelShape
    bits: int
    value_bytes: int
    compute_bytes: int
    double_quant: bool
    trained: Trained
    head_rows: int

    @classmethod
    def of(cls, cfg: Mapping[str, Any], shape: ModelShape, device: DevicePlan) -> Estimator:
        """Take what decides memory from a config."""
        method, everything = cfg["method"], cfg["method"]["trains"] == "all"
        adapted = () if everything else tuple(one for one in shape.linears if _adapts(method["target_modules"], one.name))
        trained = Trained(
            rank=0 if everything else method["rank"],
            layers=adapted,
            dropout=bool(method["dropout"]),
            state_bytes=STATE_BYTES.get(cfg["optim"]["_target_"].rpartition(".")[2], 8),
            num_copies=_reference_copies(cfg),
            everything=everything,
        )
        return cls(
            shape, method["bits"], DTYPES[cfg["model"]["dtype"]].itemsize, device.compute_dtype.itemsize,
            method["double_quant"], trained, cfg["objective"]["head_chunk_tokens"],
        )  # fmt: skip

    def __call__(self, execution: Execution, tokens: int) -> Footprint:
        """Estimate the peak of a step with micro-batches of ``tokens``."""
        stored = Stored(self.bits, self.value_bytes, self.double_quant, execution.dense_base)
        return footprint(self.shape, stored, self.trained, execution, Step(tokens, self.compute_bytes, self.head_rows))


def _reference_copies(cfg: Mapping[str, Any]) -> int:
    """Count the frozen adapters that stand beside the one that trains."""
    objective = cfg["objective"]
    reference = objective.get("reference")
    if reference in (None, "base") or (reference == "initial" and cfg["init_from"] is None):
        return 0
    return 1


def _adapts(targets: str | list[str], name: str) -> bool:
    """Tell whether a linear layer of the decoder's layers is adapted, as PEFT would."""
    return isinstance(targets, str) or any(name == one or name.endswith(f".{one}") for one in targets)
