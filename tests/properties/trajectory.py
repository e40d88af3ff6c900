"""The small jobs whose curves are kept: the built-in world and model, float32 on one CPU thread."""

from __future__ import annotations

import contextlib
import io
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import fine_tune
from fine_tune.modules.step import StepModule
from fine_tune.packing.batches import StepBatch

FOLDER = Path(__file__).parent / "trajectories"
CURVES = ("train/loss", "grad_norm")
LENGTH = 50
CLOCKED = {"tokens_per_second", "samples_per_second", "step_seconds", "mfu"}
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
OBJECTIVES = ("sft", "dpo")


class Enough(Exception):
    """The steps that were asked for are done."""


def job(objective: str, run_dir: Path, cache: Path, *more: str) -> list[str]:
    """Words of a run of `LENGTH` steps; two micro-batches in most of them."""
    return [
        f"objective={objective}", "trainer=cpu", "method=lora", "method.rank=4", "method.target_modules=[q_proj,v_proj]",
        f"trainer.max_steps={LENGTH}", "optim.global_batch_size=4", "data.max_seq_len=64", "trainer.micro_batch_tokens=128",
        "optim.lr=1e-3", "optim.schedule=cosine", "optim.warmup_share=0.06", "seed=42", "callbacks=none", "trainer.checklist=false",
        "data.num_eval_items=0", "data.options.num_train=40", "data.options.num_heldout=4",
        f"data.cache_dir={cache}", f"run_dir={run_dir}", *more,
    ]  # fmt: skip


def lines_of(words: list[str], *, steps: int = LENGTH) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl up to that step, which end a run of `LENGTH` steps early."""
    run_dir = Path(next(word for word in words if word.startswith("run_dir=")).partition("=")[2])
    train_step = StepModule.training_step

    def stopping(self: StepModule, batch: StepBatch, batch_idx: int) -> None:
        if batch.step == steps:
            raise Enough
        train_step(self, batch, batch_idx)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Enough):
        patch.setattr(StepModule, "training_step", stopping)
        try:
            fine_tune.train(words)
        finally:
            torch.set_num_threads(threads)
    return read_lines(run_dir)


def read_lines(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what a clock decides."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCKED} for line in lines]


def curves_of(lines: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Each curve over the training steps."""
    return {name: [line[name] for line in lines if name in line] for name in CURVES}


def stamp() -> dict[str, str]:
    """What decides the last digits: versions, the machine's kind, and the instructions that sums are made of."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_vendor": _vendor(),
    }


def _vendor() -> str:
    # Libraries of linear algebra choose their kernels by it.
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), platform.processor()
    )
