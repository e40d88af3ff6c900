"""One run of train.py in a process of its own, and the figures that it left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
# What every timed run leaves out: writing checkpoints is not what is measured.
COMMON = ("trainer.num_workers=2", "callbacks.checkpoint=null")
FIGURES = (
    "peak_memory_gb", "reserved_memory_gb", "host_paged_gb", "memory_limit_gb", "mfu", "tokens_per_second", "train_loss",
    "skipped_steps", "device", "precision", "trainable_parameters", "total_parameters",
)  # fmt: skip


def train(words: Sequence[str], place: Path, *, timeout: float = 300.0, ranks: int = 1) -> dict[str, Any]:
    """Run train.py and read what it left; what went wrong is part of the result.

    Speed and MFU are those of the second half of the steps, ``summary`` holds those of all, compilation included. With more than
    one rank torchrun starts them.
    """
    shutil.rmtree(place, ignore_errors=True)
    started = time.perf_counter()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(TRAIN), *COMMON, *words, f"run_dir={place}"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return {"exit_code": None, "error": f"stopped after {timeout:.0f} s", "wall_seconds": timeout}
    wall = {"exit_code": done.returncode, "wall_seconds": time.perf_counter() - started}
    if done.returncode:
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        return {**wall, "error": " ".join(said[-4:])[-600:]}
    # Such as that layers run uncompiled: a figure of another kind of run.
    warned = [line.strip()[-300:] for line in done.stderr.splitlines() if "Warning: " in line]
    return {**wall, **_figures(place), "warned": warned}


def _figures(place: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    late = steps[len(steps) // 2 :]
    seconds = sum(line["step_seconds"] for line in late)
    summary = json.loads((place / "summary.json").read_text(encoding="utf-8"))
    trainer = yaml.safe_load((place / "config.yaml").read_text(encoding="utf-8"))["trainer"]
    busy = [line["mfu"] * line["step_seconds"] for line in late if line["mfu"] is not None]
    return {
        **{key: summary.get(key) for key in FIGURES},
        "tokens_per_second": sum(line["tokens"] for line in late) / seconds,
        "mfu": sum(busy) / seconds if busy else None,
        "summary": {key: summary.get(key) for key in ("tokens_per_second", "mfu")},
        "speed": trainer["speed"],
        "recompute": trainer["recompute"],
        "micro_batch_tokens": trainer["micro_batch_tokens"],
        "steps": len(steps),
        "first_step_seconds": steps[0]["step_seconds"],
        "checklist_seconds": _checklist_seconds(place),
        "first_loss": steps[0]["train/loss"],
        "last_loss": steps[-1]["train/loss"],
    }


def _checklist_seconds(place: Path) -> float | None:
    """Read what the checklist of the first steps took; None where it was switched off."""
    file = place / "checklist.json"
    return float(json.loads(file.read_text(encoding="utf-8"))["seconds"]) if file.is_file() else None


def number(value: float | None, form: str = ".2f") -> str:
    """Print a figure, or a dash for one that does not apply."""
    return "-" if value is None else format(value, form)


def write(results: Sequence[dict[str, Any]], table: str, out: Path) -> None:
    """Write the results so far, so that nothing is lost."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps({"results": list(results)}, indent=2) + "\n", encoding="utf-8")
    (out / "table.txt").write_text(table, encoding="utf-8")
