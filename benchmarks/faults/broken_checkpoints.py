"""Protections of checkpoints and exports, taken out on purpose."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.faults.broken import nothing, replace, variant


def _believe(folder: Path) -> Any:
    """Take a checkpoint for whole, whatever is in it."""
    from fine_tune.checkpoints import Checkpoint

    file = folder / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return Checkpoint(folder, int(manifest.get("step", folder.name.partition("-")[2])), manifest)


@variant
def in_place() -> None:
    """Checkpoints are written where they belong, and one that is half written is taken for whole."""

    @contextlib.contextmanager
    def new_folder(place: Path) -> Iterator[Path]:
        place.mkdir(parents=True, exist_ok=True)
        yield place

    replace("fine_tune.checkpoints", "new_folder", lambda old: new_folder)
    replace("fine_tune.checkpoints", "verify", lambda old: _believe)


@variant
def unhashed() -> None:
    """Nobody compares files with their manifest."""
    replace("fine_tune.checkpoints", "verify", lambda old: _believe)


@variant
def unforgiving() -> None:
    """The first damaged checkpoint ends the run, whatever else there is."""

    def strict(old: Any) -> Any:
        def valid_checkpoints(root: Path) -> Any:
            good, bad = old(root)
            from fine_tune.errors import CheckpointError

            missing = [folder for folder in root.glob("step-*") if not (folder / "manifest.json").is_file()]
            if bad or missing:
                raise CheckpointError(f"{bad or missing}")
            return good, bad

        return valid_checkpoints

    replace("fine_tune.checkpoints", "valid_checkpoints", strict)


@variant
def by_mtime() -> None:
    """The newest checkpoint is the one with the newest file times."""

    def by_time(old: Any) -> Any:
        def latest(root: Path) -> Any:
            from fine_tune.checkpoints import valid_checkpoints

            good, bad = valid_checkpoints(root)
            return max(good, key=lambda found: found.folder.stat().st_mtime, default=None), bad

        return latest

    replace("fine_tune.checkpoints", "latest", by_time)


@variant
def unpickled() -> None:
    """Trainer states are loaded with pickle."""
    import torch

    load = torch.load
    torch.load = lambda *args, **kwargs: load(*args, **{**kwargs, "weights_only": False})


@variant
def forgetful() -> None:
    """Random states are not restored."""
    replace("fine_tune.rng", "restore_rng", lambda old: nothing)


@variant
def leftovers_taken() -> None:
    """What a killed writer left is neither removed nor told apart from a checkpoint."""

    def with_leftovers(old: Any) -> Any:
        def latest(root: Path) -> Any:
            found, bad = old(root)
            left = sorted(root.glob(".tmp-*")) if root.is_dir() else []
            return (_believe_half(left[-1]) if left else found), bad

        return latest

    replace("fine_tune.run_folder", "remove_leftovers", lambda old: lambda folder: 0)
    replace("fine_tune.checkpoints", "latest", with_leftovers)


def _believe_half(folder: Path) -> Any:
    from fine_tune.checkpoints import Checkpoint

    return Checkpoint(folder, int(folder.name.rpartition("-")[2]), {})


@variant
def exported_once() -> None:
    """An adapter folder that is there is taken for whole."""

    def once(old: Any) -> Any:
        def export(job: Any, *args: Any, **kwargs: Any) -> None:
            if not (job.path / "adapter").exists():
                old(job, *args, **kwargs)

        return export

    replace("fine_tune.runs", "_export", once)
