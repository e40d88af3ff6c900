"""A run's folder: its name, its lock, and what is written before the first step."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from fine_tune.errors import ConfigError, RunLocked, StorageError
from fine_tune.redaction import masked, redact
from fine_tune.storage import remove_leftovers, storage_errors, write_json, write_text
from fine_tune.watching import Pruned

CONFIG, SUMMARY, LOCK = "config.yaml", "summary.json", ".lock"
FAILURE, ERROR_LOG = "failure.json", "error.log"
SPEED_KEYS = ("speed", "micro_batch_tokens", "recompute", "offload", "compile", "fused_lora", "dense_base")
# Exit codes of runs that a signal stopped: they go on, and have not failed.
INTERRUPTED = (130, 143)
RECORDED = (
    "torch",
    "lightning",
    "transformers",
    "peft",
    "bitsandbytes",
    "datasets",
    "hydra-core",
    "omegaconf",
    "fine-tune",
)
# Values that do not change what a run computes do not change its name either.
UNNAMED = ("run_name", "run_dir", "sweep_dir", "overwrite", "resume", "logger", "hints")
UNNAMED_TRAINER = ("accelerator", "devices", "num_nodes", "strategy", "num_workers", "memory_limit_gb", "checklist")


@dataclass
class RunFolder:
    """An open run folder; only one live process has it open."""

    path: Path
    lock: FileLock

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    def close(self) -> None:
        """Let other processes in."""
        self.lock.release()


def default_name(cfg: Mapping[str, Any], data_fingerprint: str) -> str:
    """Name a run by what was chosen and a short hash of everything that decides its result."""
    digest = _digest([_deciding(cfg, UNNAMED_TRAINER), data_fingerprint])[:8]
    chosen = "-".join(cfg[group]["name"] for group in ("model", "method", "data", "objective"))
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', chosen)}-{digest}"


def config_hash(cfg: Mapping[str, Any]) -> str:
    """Hash what decides a run's result but for rounding: the same before and after its speed is settled."""
    return _digest(_deciding(cfg, (*UNNAMED_TRAINER, *SPEED_KEYS)))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _deciding(cfg: Mapping[str, Any], left_out: Collection[str]) -> dict[str, Any]:
    kept = {key: value for key, value in cfg.items() if key not in UNNAMED}
    kept["trainer"] = {key: value for key, value in cfg["trainer"].items() if key not in left_out}
    kept["data"] = {key: value for key, value in cfg["data"].items() if key != "cache_dir"}
    kept["objective"] = {key: value for key, value in cfg["objective"].items() if key != "reference_store"}
    return kept


def choose_folder(
    cfg: Mapping[str, Any], data_fingerprint: str, taken: Collection[Path] = ()
) -> tuple[Path, str | None]:
    """Decide where a new run lives; returns the folder and a line to print, if there is something to say.

    Args:
        cfg: A checked config.
        data_fingerprint: Hash of the data that it names.
        taken: Folders that other processes have just opened.

    Raises:
        ConfigError: An explicit ``run_name`` or ``run_dir`` exists and ``overwrite`` is off.
    """
    root = Path(cfg["sweep_dir"] or "runs")
    if cfg["run_dir"] or cfg["run_name"]:
        key = "run_dir" if cfg["run_dir"] else "run_name"
        folder = Path(cfg["run_dir"]) if cfg["run_dir"] else root / cfg["run_name"]
        with storage_errors(folder, every=True):
            if folder.is_file():
                raise ConfigError(f"{key}={cfg[key]}: {folder} is a file. Choose another name.")
            if _occupied(folder) and not cfg["overwrite"]:
                raise ConfigError(
                    f"{key}={cfg[key]}: {folder} exists. Go on with resume={folder}, replace it with overwrite=true, or choose "
                    "another name."
                )
        return folder, None
    name = default_name(cfg, data_fingerprint)
    folder, number = root / name, 1
    while _occupied(folder) or folder in taken:
        number += 1
        folder = root / f"{name}-{number}"
    if number == 1:
        return folder, None
    earlier = root / (name if number == 2 else f"{name}-{number - 1}")
    interrupted = f"was interrupted: go on with resume={earlier}"
    state = "is running" if earlier in taken else "is finished" if (earlier / SUMMARY).is_file() else interrupted
    return folder, f"{earlier} has this config and {state}. This run is {folder.name}."


def refuse_to_delete(folder: Path, *, needed: Mapping[str, Any]) -> None:
    """Refuse ``overwrite`` where it would delete something else than a run, or what the new run reads.

    Args:
        folder: The folder that would be emptied.
        needed: Values of keys that may name a file or folder.

    Raises:
        ConfigError: The folder holds no run, or a needed path lies in it.
    """
    if _occupied(folder) and not (folder / CONFIG).is_file():
        raise ConfigError(f"overwrite=true: {folder} holds no run (no {CONFIG}), so nothing in it is deleted. Choose another.")
    for key, name in needed.items():
        if isinstance(name, str) and Path(name).expanduser().resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"overwrite=true: {key}={name} is in the folder that would be deleted. Choose another run_name.")


def _occupied(folder: Path) -> bool:
    if folder.is_dir():
        # A start that was refused leaves nothing but its lock and what it said.
        return any(item.name not in (LOCK, FAILURE, ERROR_LOG) for item in folder.iterdir())
    return folder.exists()


def open_folder(path: Path) -> RunFolder:
    """Create and lock a run folder, and delete what a killed writer left in it.

    Raises:
        RunLocked: Another live process has it open.
        StorageError: It cannot be created.
    """
    with storage_errors(path, every=True):
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(path / LOCK))
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise RunLocked(
                f"{path} is in use by another process. Wait for it, or choose another run_name=."
            ) from error
    for place in (path, path / "checkpoints"):
        remove_leftovers(place)
    return RunFolder(path, lock)


def open_new(cfg: Mapping[str, Any], data_fingerprint: str) -> tuple[RunFolder, str | None]:
    """Choose and open the folder of a new run; of several that start at one moment each gets its own.

    Raises:
        ConfigError: An explicit name exists and ``overwrite`` is off.
        RunLocked: Another live process has an explicitly named folder open.
    """
    taken: list[Path] = []
    while True:
        path, note = choose_folder(cfg, data_fingerprint, taken)
        named = bool(cfg["run_name"] or cfg["run_dir"])
        try:
            folder = open_folder(path)
        except RunLocked:
            if named:
                raise
        else:
            # Another process may have begun, and ended, since the name was chosen.
            if named or not _occupied(path):
                return folder, note
            folder.close()
        taken.append(path)


def clear_folder(path: Path) -> None:
    """Delete an earlier run, the lock excepted; call when nothing can refuse the new one any more."""
    for item in path.iterdir():
        if item.name != LOCK:
            shutil.rmtree(item) if item.is_dir() else item.unlink()


@contextmanager
def failure_told(folder: Path) -> Iterator[None]:
    """Leave in the folder how the run failed, for who looks at it later; a new start takes it away.

    ``failure.json`` has exit code, class and message, ``error.log`` also the traceback; secrets are masked in both.
    """
    if (folder / FAILURE).is_file():
        # An error.log alone is not ours.
        for name in (ERROR_LOG, FAILURE):
            (folder / name).unlink(missing_ok=True)
    try:
        yield
    except Pruned:
        raise
    except Exception as error:
        code = getattr(error, "exit_code", 1)
        if code not in INTERRUPTED:
            # A disk that is full is often why it failed.
            with suppress(OSError, StorageError):
                told = {"exit_code": code, "error": type(error).__name__, "reason": masked(str(error))}
                write_json(folder / FAILURE, told)
                write_text(folder / ERROR_LOG, masked("".join(traceback.format_exception(error))))
        raise


def write_config(folder: Path, cfg: Mapping[str, Any]) -> None:
    """Write the resolved config without secrets; evaluation, merging and resuming read the run from it."""
    header = "# Resolved config of this run, written by fine_tune. Read as data, never executed.\n"
    write_text(folder / CONFIG, header + yaml.safe_dump(redact(dict(cfg)), sort_keys=False, allow_unicode=False))


def write_manifest(
    folder: Path, *, seed: int, device: str, fingerprints: Mapping[str, str | None], overrides: list[str]
) -> None:
    """Write what is needed to explain or repeat the run: versions, commit, command, device, fingerprints."""
    write_json(
        folder / "manifest.json",
        {
            "versions": versions(),
            "git_commit": git_commit(),
            "seed": seed,
            "command": redact(shlex.join([Path(sys.argv[0]).name, *overrides])),
            "device": device,
            "platform": platform.platform(),
            **fingerprints,
        },
    )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide results."""
    found = {name: _version(name) for name in RECORDED}
    return {"python": platform.python_version()} | {name: version for name, version in found.items() if version is not None}


@functools.cache
def _version(name: str) -> str | None:
    # Looked for on the whole path of imports: a tenth of a second for all of them.
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def git_commit() -> str | None:
    """Return the commit of the working tree this code runs from, with ``-dirty`` for local changes; None outside one."""
    options: dict[str, Any] = {
        "cwd": Path(__file__).parent,
        "capture_output": True,
        "text": True,
        "timeout": 5,
        "check": True,
    }
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], env=environment, **options).stdout.strip()
        changes = subprocess.run(["git", "status", "--porcelain", "-uno"], env=environment, **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if changes else commit
