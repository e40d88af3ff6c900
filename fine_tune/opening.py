"""Which folder a run lives in, whether something of it is there already, and where it goes on from."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich

from fine_tune import checkpoints, safe_load
from fine_tune.assembly import prepare_spec
from fine_tune.data.prepare import data_fingerprint
from fine_tune.errors import CheckpointError, ConfigError
from fine_tune.models.adapter import find_adapter_file
from fine_tune.report.visible import visible
from fine_tune.rules import select
from fine_tune.run_folder import (
    CONFIG,
    SUMMARY,
    RunFolder,
    choose_folder,
    config_hash,
    default_name,
    open_folder,
    open_new,
    refuse_to_delete,
)
from fine_tune.storage import sha256

# Keys that may name a place which the run itself reads.
READ_FROM = ("init_from", "objective.reference", "objective.reference_store", "data.path", "data.val_path", "model.path")


@contextmanager
def opened(cfg: Mapping[str, Any], *, rank: int) -> Iterator[tuple[Path, checkpoints.Checkpoint | None]]:
    """Open the run's folder, new or to go on with, and find the checkpoint to go on from.

    Only rank 0 owns the folder; what other ranks write goes to a folder that vanishes.
    """
    if rank > 0:
        found, _ = _latest(cfg, _place(cfg)[0])
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch), found
        return
    folder, notes = _open(cfg)
    found, damaged = _latest(cfg, folder.path)
    for line in [*damaged, *notes]:
        say(line)
    try:
        yield folder.path, found
    finally:
        folder.close()


def _latest(cfg: Mapping[str, Any], path: Path) -> tuple[checkpoints.Checkpoint | None, list[str]]:
    return (None, []) if cfg["overwrite"] else checkpoints.latest(path / "checkpoints")


def _open(cfg: Mapping[str, Any]) -> tuple[RunFolder, list[str]]:
    """Open the run's folder; of several processes that start a new run at one moment each gets its own."""
    path, notes = _place(cfg)
    if cfg["resume"] or cfg["sweep_dir"]:
        return open_folder(path), notes
    folder, note = open_new(cfg, data_fingerprint(prepare_spec(cfg)))
    return folder, [note] if note else []


def _place(cfg: Mapping[str, Any]) -> tuple[Path, list[str]]:
    """Find the folder of a run that is resumed, of a sweep's job that has one already, or of a new run."""
    if cfg["resume"]:
        path = Path(cfg["resume"]).expanduser()
        if not path.is_dir():
            raise CheckpointError(f"resume={path}: no such run folder.")
        return path, []
    fingerprint = data_fingerprint(prepare_spec(cfg))
    if cfg["sweep_dir"]:
        path, note = Path(cfg["sweep_dir"]) / (cfg["run_name"] or default_name(cfg, fingerprint)), None
        if not cfg["overwrite"]:
            _refuse_another(path, cfg)
    else:
        path, note = choose_folder(cfg, fingerprint)
    if cfg["overwrite"]:
        refuse_to_delete(path, needed={key: select(cfg, key) for key in READ_FROM})
    return path, [note] if note else []


def _refuse_another(path: Path, cfg: Mapping[str, Any]) -> None:
    """Refuse to take a folder's results for those of a job that asks for something else."""
    file = path / "manifest.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if found.get("config_hash") not in (None, config_hash(cfg)):
        raise ConfigError(
            f"{path}: holds a run of another config, or one that was made longer. Pass overwrite=true to replace it, or another "
            "run_name or sweep_dir."
        )


def finished_in_sweep(cfg: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """Return the summary of a sweep's job that an earlier start of the sweep has finished."""
    if not cfg["sweep_dir"] or cfg["overwrite"] or cfg["resume"] or not (path / SUMMARY).is_file():
        return None
    before = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    changed = [key for key, value in adapter_hashes(cfg).items() if before.get(key) not in (None, value)]
    if changed:
        raise CheckpointError(
            f"{path} is finished, but {', '.join(changed)} changed since: its adapter has been trained on. Pass overwrite=true to "
            "do it again, or another sweep_dir."
        )
    say(f"{path} is finished and skipped; overwrite=true does it again.")
    return dict(json.loads((path / SUMMARY).read_text(encoding="utf-8")))


def adapter_hashes(cfg: Mapping[str, Any]) -> dict[str, str]:
    """Hash the adapters that a new run starts from and is measured against, where they are files."""
    sources = {"init_from": cfg["init_from"], "objective.reference": cfg["objective"].get("reference")}
    folders = {key: Path(name).expanduser() for key, name in sources.items() if name not in (None, "initial", "base")}
    found = {key: find_adapter_file(folder, key=key) for key, folder in folders.items() if folder.is_dir()}
    return {f"{key} (content)": sha256(file) for key, file in found.items()}


def nothing_left(cfg: Mapping[str, Any], path: Path, *, done: int | None, num_steps: int) -> bool:
    """Tell whether a resumed run has no step left: it did them all, or stopped early under this very config.

    Args:
        cfg: The config to go on with.
        path: The run's folder, as the earlier start left it.
        done: Steps of its newest checkpoint, None without one.
        num_steps: Steps that the config asks for.

    Raises:
        ConfigError: It has done more steps than the config asks for.
    """
    if done is None:
        return False
    if done > num_steps:
        raise ConfigError(
            f"trainer.max_steps={num_steps}: the run has done {done} steps. Ask for more, or leave it out."
        )
    if done == num_steps or not ((path / SUMMARY).is_file() and (path / CONFIG).is_file()):
        return done == num_steps
    if json.loads((path / SUMMARY).read_text(encoding="utf-8"))["steps"] != done:
        return False  # its last checkpoint is lost, so its last steps are done again
    before = safe_load.yaml_text((path / CONFIG).read_text(encoding="utf-8"))["trainer"]
    return all(before[key] == cfg["trainer"][key] for key in ("max_steps", "max_epochs"))


def say(line: str) -> None:
    """Print a line as it is, without markup."""
    rich.get_console().print(visible(line), markup=False, highlight=False)
