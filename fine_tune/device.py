"""Which device and which precision a run uses, checked before any weight is loaded."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from fine_tune.errors import ConfigError, EnvironmentProblem

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of the memory that is free, what a model's weights may take; the rest is for activations and libraries.
USABLE = 0.85
COMPUTE = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class DevicePlan:
    """One process's device, Lightning's accelerator name and precision, and the ranks of the run."""

    device: torch.device
    accelerator: str
    precision: str
    num_ranks: int
    rank: int

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return COMPUTE[self.precision]

    @property
    def is_ampere(self) -> bool:
        """The device is a GPU of Ampere's generation (sm80) or a later one."""
        return self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (8, 0)

    def describe(self) -> str:
        """Name the device for people and manifests."""
        name = (
            torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else f"CPU, {torch.get_num_threads()} threads"
        )
        return name if self.num_ranks == 1 else f"{self.num_ranks} x {name}"


def plan_device(*, accelerator: str, devices: int, num_nodes: int, precision: str) -> DevicePlan:
    """Settle device, precision and ranks.

    Several devices are launched by torchrun, one process each; a process then finds its place in the environment.

    Raises:
        EnvironmentProblem: The config asks for a GPU and there is none, or for bf16 and the GPU has none.
        ConfigError: Several devices without a launcher, or a launcher of another size.
    """
    cuda = torch.cuda.is_available()
    if accelerator == "gpu" and not cuda:
        raise EnvironmentProblem(
            "trainer.accelerator=gpu: torch sees no GPU here. Use trainer=cpu, or install a CUDA build of torch."
        )
    on_gpu = cuda and accelerator != "cpu"
    rank, local_rank, num_ranks = (
        int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    if num_ranks != devices * num_nodes:
        raise ConfigError(
            f"trainer.devices={devices}: this is process {rank} of {num_ranks}. Launch one process per device: "
            f"torchrun --nproc-per-node {devices} train.py trainer=ddp trainer.devices={devices} ..."
        )
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    return DevicePlan(device, "gpu" if on_gpu else "cpu", _precision(precision, device), num_ranks, rank)


def _precision(wanted: str, device: torch.device) -> str:
    bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if wanted == "auto":
        return "32-true" if device.type == "cpu" else "bf16-mixed" if bf16 else "16-mixed"
    if wanted == "16-mixed" and device.type == "cpu":
        raise ConfigError(
            "trainer.precision=16-mixed: CPUs have no fp16 training. Use precision=auto, 32-true or bf16-mixed."
        )
    if wanted == "bf16-mixed" and device.type == "cuda" and not bf16:
        name = torch.cuda.get_device_name(device)
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
