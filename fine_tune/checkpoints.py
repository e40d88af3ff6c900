"""Checkpoints on disk: what trains, the state to go on from, and a manifest that makes both trustworthy."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fine_tune import safe_load
from fine_tune.errors import CheckpointError, NonFiniteError, StorageError
from fine_tune.storage import new_folder, sha256, sync_file, write_json

ADAPTER_FILE, TRAINER_FILE, MANIFEST = "adapter.safetensors", "trainer.pt", "manifest.json"
NAME = re.compile(r"step-(\d{7,})", re.ASCII)
ADVICE = "Use an earlier checkpoint."


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder, step and manifest."""

    folder: Path
    step: int
    manifest: Mapping[str, Any]

    def adapter(self) -> dict[str, Tensor]:
        """Read what trains."""
        return safe_load.tensors(self.folder / ADAPTER_FILE, advice=ADVICE)

    def trainer_state(self) -> dict[str, Any]:
        """Read optimizer, schedule, random states and counters; nothing in the file can run code."""
        return safe_load.trainer_state(self.folder / TRAINER_FILE, advice=ADVICE)


def save(
    root: Path, step: int, *, adapter: dict[str, Tensor], trainer: dict[str, Any], record: dict[str, Any]
) -> Checkpoint:
    """Write ``root/step-NNNNNNN`` so that it exists whole or not at all; the manifest is its last file.

    Raises:
        NonFiniteError: A weight is NaN or infinite; nothing is written.
        StorageError: The disk refused.
    """
    broken = [name for name, tensor in adapter.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise NonFiniteError(
            f"step {step}: {len(broken)} tensors are not finite ({broken[0]}); the checkpoint is not written."
        )
    if not root.parent.is_dir():
        # Made again, it would be a run without its config.
        raise StorageError(f"{root.parent} is gone, and step {step} is not saved. Put it back and go on with resume=.")
    place = root / f"step-{step:07d}"
    with new_folder(place) as folder:
        try:
            save_file(adapter, str(folder / ADAPTER_FILE), metadata={"format": "pt"})
            torch.save(trainer, folder / TRAINER_FILE)
        except (SafetensorError, RuntimeError) as error:
            # Both libraries hide the operating system's error in one of their own.
            raise StorageError(f"cannot write {place}: {error}. Earlier checkpoints are untouched; free space.") from error
        for name in (ADAPTER_FILE, TRAINER_FILE):
            sync_file(folder / name)
        files = {name: _entry(folder / name) for name in (ADAPTER_FILE, TRAINER_FILE)}
        manifest = {"step": step, **record, "files": files}
        write_json(folder / MANIFEST, manifest)
    return Checkpoint(place, step, manifest)


def _entry(file: Path) -> dict[str, Any]:
    return {"sha256": sha256(file), "bytes": file.stat().st_size}


def verify(folder: Path) -> Checkpoint:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: The manifest is missing or damaged, or a file differs from it.
    """
    try:
        manifest = safe_load.json_object(folder / MANIFEST)
        step, files = int(manifest["step"]), dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: no readable {MANIFEST} ({type(error).__name__}). {ADVICE}"
        ) from error
    # A folder under a name of its own, such as a copy put aside, tells no step.
    if (named := NAME.fullmatch(folder.name)) and int(named[1]) != step:
        raise CheckpointError(f"{folder}: its {MANIFEST} is of step {step}. {ADVICE}")
    for name in (ADAPTER_FILE, TRAINER_FILE):
        file = folder / name
        if not file.is_file() or name not in files or sha256(file) != files[name]["sha256"]:
            raise CheckpointError(f"{file}: missing, or its content is not what was saved. {ADVICE}")
    return Checkpoint(folder, step, manifest)


def valid_checkpoints(root: Path) -> tuple[list[Checkpoint], list[str]]:
    """Return the checkpoints under ``root`` that verify, lowest step first, and a line on each that does not."""
    good, bad = [], []
    for folder in sorted(root.glob("step-*")) if root.is_dir() else []:
        if not NAME.fullmatch(folder.name):
            continue
        try:
            good.append(verify(folder))
        except (CheckpointError, SafetensorError) as error:
            bad.append(str(error))
    return sorted(good, key=lambda c: c.step), bad


def latest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the valid checkpoint of the highest step; file times play no part."""
    good, bad = valid_checkpoints(root)
    return (good[-1] if good else None), bad


def prune(root: Path, newest: int, *, keep: int, best_step: int | None) -> list[int]:
    """Delete all but ``keep`` checkpoints up to the one just saved, and the best one, once ``newest`` verifies.

    A later one that is damaged stays where it is until its step is saved again. Returns the steps deleted.
    """
    whole = sorted(
        (int(m[1]), f) for f in root.glob("step-*") if (m := NAME.fullmatch(f.name)) and (f / MANIFEST).is_file()
    )
    whole = [(step, folder) for step, folder in whole if step <= newest]
    verify(root / f"step-{newest:07d}")
    spare = [(step, folder) for step, folder in whole[: max(0, len(whole) - keep)] if step != best_step]
    for _, folder in spare:
        # The manifest goes first: a half-deleted checkpoint is then no checkpoint.
        (folder / MANIFEST).unlink()
        shutil.rmtree(folder)
    return [step for step, _ in spare]
