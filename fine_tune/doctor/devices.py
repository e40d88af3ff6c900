"""What runs compute on, and what follows from it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fine_tune.device import DevicePlan, plan_device
from fine_tune.doctor.finding import Finding
from fine_tune.doctor.four_bits import four_bit_finding
from fine_tune.errors import FineTuneError

DRIVER = Path("/proc/driver/nvidia/version")
GB = 1e9


def device_findings() -> Iterator[Finding]:
    """Look at CPU and GPUs, at what a run would choose, and at 4-bit arithmetic on each kind."""
    yield _cpu()
    if torch.cuda.is_available():
        yield from (_gpu(index) for index in range(torch.cuda.device_count()))
    elif DRIVER.exists():
        yield Finding(
            "gpu",
            "look",
            f"there is an NVIDIA driver, but torch {torch.__version__} sees no GPU. Install a CUDA build.",
        )
    else:
        yield Finding("gpu", "ok", f"none (torch {torch.__version__}); runs use the CPU.", {"count": 0})
    plan: DevicePlan | None = None
    try:
        plan = plan_device(accelerator="auto", devices=1, num_nodes=1, precision="auto")
        yield _choices(plan)
    except FineTuneError as error:
        yield Finding("a run here", "look", str(error).splitlines()[-1].strip(" -"))
    yield four_bit_finding(torch.device("cpu"), torch.float32)
    if plan is not None and plan.device.type == "cuda":
        yield four_bit_finding(plan.device, plan.compute_dtype)


def _cpu() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    kind = torch.backends.cpu.get_cpu_capability()
    values = {"cores": cores, "threads": torch.get_num_threads(), "capability": kind, "avx512_bf16": _repacks()}
    says = f"{cores} cores, torch uses {values['threads']} threads and {kind}"
    if values["avx512_bf16"]:
        # Looked at by people who compare with another program, so it is no warning.
        says += "; AVX512-BF16, for which bitsandbytes repacks 4-bit weights and later gradients are wrong: switched off in runs"
    return Finding("cpu", "ok", f"{says}.", values)


def _repacks() -> bool | None:
    """Whether the CPU is one for which bitsandbytes repacks; None where it cannot be asked."""
    try:
        from bitsandbytes import functional

        asked: Any = functional.has_avx512bf16
        return bool(asked())
    except (ImportError, OSError, RuntimeError, AttributeError):
        # A library that cannot be loaded, or has no such question, is told of where it is tried.
        return None


def _gpu(index: int) -> Finding:
    free, total = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    name = torch.cuda.get_device_name(index)
    says = (
        f"{name}, {free / GB:.1f} of {total / GB:.1f} GB free, capability {major}.{minor}, CUDA {torch.version.cuda}."
    )
    values = {"name": name, "free_gb": free / GB, "total_gb": total / GB, "capability": [major, minor]}
    return Finding(f"gpu {index}", "ok", says, values)


def _choices(plan: DevicePlan) -> Finding:
    speeds = speeds_of(plan)
    attention = (
        "variable-length flash attention" if plan.is_ampere and has_varlen() else "attention by segments of like length"
    )
    says = f"{plan.describe()}: trainer.precision {plan.precision}, {attention}, trainer.speed {' or '.join(speeds)}."
    return Finding(
        "a run here", "ok", says, {"precision": plan.precision, "attention": attention, "speeds": list(speeds)}
    )


def speeds_of(plan: DevicePlan) -> tuple[str, ...]:
    """What ``trainer.speed=auto`` may choose; named anew, as the module that decides imports every library."""
    return ("balanced", "lean") if plan.is_ampere else ("plain",)


def has_varlen() -> bool:
    """Whether this torch has the kernel."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return False
    return True
