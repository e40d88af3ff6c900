"""How tests of evaluate ask, and how they read what it wrote."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import fine_tune
from fine_tune.storage import sha256

CPU = ["accelerator=cpu", "precision=32-true"]
QUESTIONS, BATCH = 24, 4


def evaluate(ckpt: object, run_dir: Path, *words: str) -> dict[str, Any]:
    """Evaluate on the CPU into a folder of the test's own."""
    named = f"[{','.join(map(str, ckpt))}]" if isinstance(ckpt, list) else ckpt
    return fine_tune.evaluate([f"ckpt={named}", f"run_dir={run_dir}", *CPU, *words])


def items(found: dict[str, Any], label: str = ".") -> list[dict[str, Any]]:
    text = (Path(found["folder"]) / label / "items.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def perplexity(stand_in: tuple[Path, Path]) -> list[str]:
    return ["eval=perplexity", f"eval.path={stand_in[1]}", "eval.format=chat", "eval.micro_batch_tokens=256"]


def asking(file: Path, *more: str) -> list[str]:
    return ["eval=exact_match", f"eval.path={file}", "eval.max_new_tokens=6", f"eval.batch_size={BATCH}", *more]


def nats(found: dict[str, Any], label: str) -> float:
    return float(found["results"][label]["nats_per_token"])


def write_lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def spoiled(run: Path, place: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """Copy a run, with every tensor of its final adapter changed."""
    shutil.copytree(run, place)
    file = place / "adapter" / "adapter_model.safetensors"
    save_file({name: change(tensor).contiguous() for name, tensor in load_file(file).items()}, file)
    # As a training that spoiled them would have written it: flipped bits alone are refused.
    known = json.loads(file.with_name("fine_tune.json").read_text(encoding="utf-8"))
    text = json.dumps(known | {"weights_sha256": sha256(file)})
    file.with_name("fine_tune.json").write_text(text, encoding="utf-8")
    return place


def whole_folder(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, byte for byte; of metrics.json without the seconds, which no two runs share."""
    found = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    for name in found:
        if name.endswith("metrics.json"):
            found[name], cut = re.subn(rb'"seconds": [0-9.e+-]+', b'"seconds": 0', found[name])
            assert cut == 1, name
    return found
