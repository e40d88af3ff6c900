"""Which device and which precision a run uses, checked before any weight is loaded."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from fine_tune.errors import ConfigError, EnvironmentProblem
from fine_tune.kernels.capability import is_ampere, is_limited, use_at_most

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of the memory that is free, what a model's weights may take; the rest is for activations and libraries.
USABLE = 0.85
GB = 1e9
# Keys of ``trainer`` that ``plan_device`` takes.
DEVICE_KEYS = ("accelerator", "devices", "num_nodes", "precision", "capability", "memory_limit_gb")
# Values of ``trainer.capability``.
CAPABILITIES = {"sm75": (7, 5)}
# Devices whose memory was limited once: an earlier run's limit is lifted for the next one of the same process.
_LIMITED: set[torch.device] = set()
COMPUTE = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class DevicePlan:
    """One process's device, Lightning's accelerator name and precision, and the ranks of the run.

    ``limit`` is the most bytes of device memory that the run may take; None for whatever is there. ``absent`` stands for a GPU
    of Ampere's generation or later that is not here and is only planned for.
    """

    device: torch.device
    accelerator: str
    precision: str
    num_ranks: int
    rank: int
    limit: int | None = None
    absent: bool = False

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return COMPUTE[self.precision]

    @property
    def is_ampere(self) -> bool:
        """The device is a GPU of Ampere's generation (sm80) or a later one, and may be used as one."""
        return not is_limited() if self.absent else is_ampere(self.device)

    def describe(self) -> str:
        """Name the device for people and manifests."""
        name = (
            torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else f"CPU, {torch.get_num_threads()} threads"
        )
        name = f"{name} used as sm75" if self.device.type == "cuda" and is_limited() else name
        return name if self.num_ranks == 1 else f"{self.num_ranks} x {name}"


class Place(NamedTuple):
    """Which process of a run this is: its rank among all, its rank on this machine, and how many there are."""

    rank: int
    local_rank: int
    num_ranks: int


def place_in_group() -> Place:
    """Read this process's place from the environment that a launcher sets."""
    return Place(*(int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))))


def plan_absent(*, precision: str, capability: str | None = None) -> DevicePlan:
    """Stand for a GPU that is not here, used as ``capability`` says; what it cannot compute in is left to ``plan_device``."""
    use_at_most(None if capability is None else CAPABILITIES[capability])
    usual = "bf16-mixed" if capability is None else "16-mixed"
    return DevicePlan(torch.device("cuda", 0), "gpu", usual if precision == "auto" else precision, 1, 0, absent=True)


def plan_device(
    *,
    accelerator: str,
    devices: int,
    num_nodes: int,
    precision: str,
    capability: str | None = None,
    memory_limit_gb: float | None = None,
) -> DevicePlan:
    """Settle device, precision and ranks, and what of the device this process may use from here on.

    Several devices are launched by torchrun, one process each; a process then finds its place in the environment.

    Args:
        accelerator: ``auto``, ``cpu`` or ``gpu``.
        devices: Of one machine.
        num_nodes: Machines.
        precision: A name of Lightning's, or ``auto``.
        capability: Use no more of the GPU than that generation has; None uses everything.
        memory_limit_gb: Most GB (1e9 bytes) of each GPU's memory, beyond which an allocation fails; None for all of it.

    Raises:
        EnvironmentProblem: The config asks for a GPU and there is none, or for bf16 and the GPU has none.
        ConfigError: Several devices without a launcher, a launcher of another size, or a memory limit without a GPU.
    """
    cuda = torch.cuda.is_available()
    if accelerator == "gpu" and not cuda:
        raise EnvironmentProblem(
            "trainer.accelerator=gpu: torch sees no GPU here. Use trainer=cpu, or install a CUDA build of torch."
        )
    on_gpu = cuda and accelerator != "cpu"
    # A CPU has no such generations, and torch's switches would be its own, too.
    use_at_most(None if capability is None or not on_gpu else CAPABILITIES[capability])
    rank, local_rank, num_ranks = place_in_group()
    if num_ranks != devices * num_nodes:
        raise ConfigError(
            f"trainer.devices={devices}: this is process {rank} of {num_ranks}. Launch one process per device: "
            f"torchrun --nproc-per-node {devices} train.py trainer=ddp trainer.devices={devices} ..."
        )
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if memory_limit_gb is not None and not on_gpu:
        raise ConfigError(
            f"trainer.memory_limit_gb={memory_limit_gb:g}: is for a GPU, and this run uses the CPU. "
            "Pass trainer.memory_limit_gb=null."
        )
    limit = None if memory_limit_gb is None else int(memory_limit_gb * GB)
    if on_gpu:
        torch.cuda.set_device(device)
        limit_memory(device, limit)
    return DevicePlan(device, "gpu" if on_gpu else "cpu", _precision(precision, device), num_ranks, rank, limit)


def limit_memory(device: torch.device, limit: int | None) -> None:
    """Let this process's tensors take so many bytes of a GPU at most, gaps between them included; None lifts the limit.

    What CUDA itself and its libraries take is not among them, as it is not in any figure of ours.
    """
    if limit is None and device not in _LIMITED:
        return
    _LIMITED.add(device)
    total = torch.cuda.get_device_properties(device).total_memory
    # A share of 1 is what torch starts with: no limit.
    torch.cuda.set_per_process_memory_fraction(1.0 if limit is None else min(1.0, max(0, limit) / total), device)


def memory_limit(device: torch.device) -> int | None:
    """Return the bytes of a device that this process was limited to, None where it may take all."""
    if device not in _LIMITED:
        return None
    share = torch.cuda.get_per_process_memory_fraction(device)
    return None if share >= 1 else round(share * torch.cuda.get_device_properties(device).total_memory)


def leave_room(device: torch.device, num_bytes: int) -> None:
    """Lower a limit by what is held beside the tensors that it counts; where there is none, there is nothing to lower."""
    limit = memory_limit(device)
    if limit is not None and num_bytes:
        limit_memory(device, limit - num_bytes)


def _precision(wanted: str, device: torch.device) -> str:
    bf16 = is_ampere(device)
    if wanted == "auto":
        return "32-true" if device.type == "cpu" else "bf16-mixed" if bf16 else "16-mixed"
    if wanted == "16-mixed" and device.type == "cpu":
        raise ConfigError(
            "trainer.precision=16-mixed: CPUs have no fp16 training. Use precision=auto, 32-true or bf16-mixed."
        )
    if wanted == "bf16-mixed" and device.type == "cuda" and not bf16:
        name = "trainer.capability=sm75" if is_limited() else torch.cuda.get_device_name(device)
        raise EnvironmentProblem(
            f"trainer.precision=bf16-mixed: {name} has no bf16. Use trainer.precision=16-mixed or auto."
        )
    return wanted


def fits(num_bytes: float, device: torch.device, *, held: float = 0) -> bool:
    """Tell whether weights of so many bytes fit a device, where ``held`` of them are there already."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory()
    return free is None or num_bytes - held <= USABLE * free


def _free_memory() -> int | None:
    """Return the bytes of main memory that are free, a container's own limit heeded; None where the system does not tell."""
    found = []
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with suppress(OSError, ValueError):
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="utf-8")) for name in ("max", "current"))
        found.append(limit - used)
    return min(found, default=None)
