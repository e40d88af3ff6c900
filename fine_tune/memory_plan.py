"""What a run will take on its device, from its config, and the speed and micro-batch that are left to be chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fine_tune.device import DTYPES, DevicePlan
from fine_tune.memory.choice import USABLE, Choice, choose
from fine_tune.memory.estimate import Footprint, Step, Stored, Trained, footprint
from fine_tune.memory.shape import LinearShape, ModelShape, UnknownShape, read_shape
from fine_tune.models.execution import Execution
from fine_tune.speed import chosen_execution, speeds_for

AUTO = "auto"
# What a CPU takes, and what any device takes whose memory cannot be planned.
DEFAULT_TOKENS = 4096
# Optimizer state on the device, in bytes per weight; paged states are where the driver puts them.
STATE_BYTES = {"AdamW": 8, "PagedAdamW32bit": 0, "PagedAdamW8bit": 0}
# Where a limit counts those pages in, they are planned as if they stayed on the device.
PAGED_BYTES = {"PagedAdamW32bit": 8, "PagedAdamW8bit": 2}


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
        free: Bytes that were free on the device; None on a CPU, and without a footprint.
        unknown: Why a GPU's memory could not be planned; None where it was, and on a CPU.
    """

    speed: str
    execution: Execution
    tokens: int
    footprint: Footprint | None = None
    free: int | None = None
    unknown: str | None = None

    @property
    def fits(self) -> bool:
        """Nothing says that it will not fit."""
        return self.footprint is None or self.free is None or self.footprint.total <= USABLE * self.free

    def describe(self) -> list[str]:
        """Say what was planned, and where it may not fit; nothing where there was nothing to plan."""
        chosen = f"trainer.speed={self.speed}, {self.tokens:,} tokens per forward"
        if self.unknown is not None:
            return [f"memory: no estimate for this model ({self.unknown}): {chosen}"]
        if self.footprint is None or self.free is None:
            return []
        peak, free = self.footprint.total / 1e9, self.free / 1e9
        lines = [f"memory: {chosen}, about {peak:.1f} of {free:.1f} GB"]
        if not self.fits:
            lines.append("note: this may not fit. Lower data.max_seq_len or method.rank, or use method=qlora.")
        return lines

    def settled(self, trainer: Mapping[str, Any]) -> dict[str, Any]:
        """Return the trainer's keys with everything chosen."""
        return {**trainer, "speed": self.speed, "micro_batch_tokens": self.tokens}


def plan_memory(
    cfg: Mapping[str, Any], device: DevicePlan, folder: Path, samples: Samples, *, card: int | None = None, held: int = 0
) -> MemoryPlan:
    """Settle ``trainer.speed`` and ``trainer.micro_batch_tokens`` where they are ``auto``, and estimate the peak.

    Args:
        cfg: A checked config.
        device: Where it will run.
        folder: The model's folder.
        samples: What the data asks for.
        card: Bytes of a card that is not here (``device`` is absent), to plan for it.
        held: Bytes that are taken and will be the run's.
    """
    trainer = cfg["trainer"]
    fixed = None if trainer["micro_batch_tokens"] == AUTO else trainer["micro_batch_tokens"]
    suited = speeds_for(device)
    names = suited if trainer["speed"] == AUTO else (trainer["speed"],)
    speeds = {name: chosen_execution({**trainer, "speed": name}) for name in names}
    usual = MemoryPlan(names[0], speeds[names[0]], fixed or max(DEFAULT_TOKENS, samples.longest))
    if device.device.type != "cuda":
        return usual
    try:
        shape = read_shape(folder, trust_remote_code=cfg["model"]["trust_remote_code"])
    except UnknownShape as error:
        return replace(usual, unknown=str(error))
    free = card if card is not None else free_memory(device) + held
    estimate = Estimator.of(cfg, shape, device)
    chosen: Choice = choose(
        speeds, estimate, budget=USABLE * free, longest=samples.longest, per_step=samples.per_step, fixed=fixed
    )
    return MemoryPlan(chosen.speed, speeds[chosen.speed], chosen.tokens, chosen.footprint, free)


def free_memory(plan: DevicePlan) -> int:
    """Bytes that tensors could take now: what no process has, and what this one holds without using it.

    Several processes must choose alike without asking each other: they take the smallest card of the machine, as if empty.
    A limit of the run leaves what it does not have in use.
    """
    limits = [] if plan.limit is None else [plan.limit]
    if plan.num_ranks > 1:
        cards = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
        return int(min(cards + limits))
    free, _ = torch.cuda.mem_get_info(plan.device)
    used = torch.cuda.memory_allocated(plan.device)
    return int(min([free + torch.cuda.memory_reserved(plan.device), *limits]) - used)


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
    copies_heads: bool = False
    casts_head: bool = False

    @classmethod
    def of(cls, cfg: Mapping[str, Any], shape: ModelShape, device: DevicePlan) -> Estimator:
        """Take what decides memory from a config."""
        method, everything = cfg["method"], cfg["method"]["trains"] == "all"
        adapted = () if everything else adapted_layers(method["target_modules"], shape)
        optimizer = cfg["optim"]["_target_"].rpartition(".")[2]
        paged = PAGED_BYTES.get(optimizer, 0) if cfg["trainer"]["memory_limit_gb"] is not None else 0
        dtype, half = DTYPES[cfg["model"]["dtype"]], device.compute_dtype.itemsize == 2
        trained = Trained(
            rank=0 if everything else method["rank"],
            layers=adapted,
            dropout=bool(method["dropout"]),
            state_bytes=STATE_BYTES.get(optimizer, 8) + paged,
            num_copies=_reference_copies(cfg),
            everything=everything,
        )
        return cls(
            shape, method["bits"], dtype.itemsize, device.compute_dtype.itemsize,
            method["double_quant"], trained, cfg["objective"]["head_chunk_tokens"],
            copies_heads=device.device.type == "cuda" and not (half and device.is_ampere),
            casts_head=dtype != device.compute_dtype,
        )  # fmt: skip

    def __call__(self, execution: Execution, tokens: int) -> Footprint:
        """Estimate the peak of a step with micro-batches of ``tokens``."""
        stored = Stored(self.bits, self.value_bytes, self.double_quant, execution.dense_base)
        step = Step(tokens, self.compute_bytes, self.head_rows, self.copies_heads, self.casts_head)
        return footprint(self.shape, stored, self.trained, execution, step)


def _reference_copies(cfg: Mapping[str, Any]) -> int:
    """Count the frozen adapters that stand beside the one that trains."""
    objective = cfg["objective"]
    reference = objective.get("reference")
    if reference in (None, "base") or (reference == "initial" and cfg["init_from"] is None):
        return 0
    return 1


def adapted_layers(targets: str | list[str], shape: ModelShape) -> tuple[LinearShape, ...]:
    """Choose the linear layers of a decoder layer that are adapted, as PEFT does."""
    every = isinstance(targets, str)
    return tuple(one for one in shape.linears if every or any(f".{one.name}".endswith(f".{name}") for name in targets))
