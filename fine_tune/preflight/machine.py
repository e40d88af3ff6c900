"""What the machine must have for a run: a device, packages, places to write to, and space on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fine_tune.data.cache import cache_folder
from fine_tune.errors import EnvironmentProblem, StorageError
from fine_tune.memory.shape import ModelShape, UnknownShape, read_shape
from fine_tune.memory_plan import adapted_layers

# Class -> the package it needs beside ours, and what installs it.
NEEDED = {
    "bitsandbytes.optim.": "bitsandbytes",
    "fine_tune.tracking.wandb_tracker.": "wandb",
    "lightning.pytorch.loggers.TensorBoardLogger": "tensorboard",
    "lightning.pytorch.loggers.WandbLogger": "wandb",
    "lightning.pytorch.loggers.MLFlowLogger": "mlflow",
    "lightning.pytorch.loggers.CometLogger": "comet_ml",
}
# Bytes per trained weight: its float32 value, and two moments of the optimizer.
VALUE_BYTES, MOMENT_BYTES = 4, {"PagedAdamW8bit": 2}
# Metrics, previews, answers, the report, a tokenizer.
SPARE_BYTES = 64_000_000


def check_packages(cfg: Mapping[str, Any]) -> None:
    """Refuse a config that needs a package which is not installed; nothing is imported.

    Raises:
        EnvironmentProblem: All that are missing, each with the key that asks for it.
    """
    missing = {
        package: key for key, package in _needed(cfg) if find_spec(package) is None
    }
    if missing:
        told = ", ".join(f"{package} ({key})" for package, key in missing.items())
        raise EnvironmentProblem(f"not installed: {told}. Install with: pip install {' '.join(missing)}, or change the key.")


def _needed(cfg: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, package) of everything that needs a package of its own."""
    if cfg["method"]["bits"] < 16:
        yield f"method={cfg['method']['name']}", "bitsandbytes"
    targets = {"optim": cfg["optim"]["_target_"]}
    for group in ("logger", "callbacks"):
        targets |= {f"{group}.{name}": node["_target_"] for name, node in cfg[group].items() if node is not None}
    for key, target in targets.items():
        for named, package in NEEDED.items():
            if target.startswith(named):
                yield key, package


def check_places(cfg: Mapping[str, Any]) -> None:
    """Refuse a cache or store that is a file, or that cannot be written.

    Raises:
        StorageError: Which key, and why.
    """
    places = {"data.cache_dir": cfg["data"]["cache_dir"], "objective.reference_store": cfg["objective"].get("reference_store")}
    for key, named in places.items():
        if named is None:
            continue
        folder = cache_folder(named) if key == "data.cache_dir" else Path(named).expanduser()
        place = existing(folder)
        if not place.is_dir():
            raise StorageError(f"{key}={named}: {place} is a file. Name a folder.")
        if not os.access(place, os.W_OK | os.X_OK):
            raise StorageError(f"{key}={named}: {place} cannot be written. Name another folder.")


def check_disk(cfg: Mapping[str, Any], model_folder: Path, run_folder: Path) -> None:
    """Refuse a run whose checkpoints would fill the disk before it ends.

    Raises:
        StorageError: What is needed, what is free, and what to change.
    """
    checkpoint, adapter = _sizes(cfg, model_folder)
    saver = cfg["callbacks"].get("checkpoint")
    # While one is written, the ones that are kept and the best one are still there; those on the disk now are rewritten.
    number = 1 if saver is None else saver["keep"] + int(saver["keep_best"]) + 1
    held = sum(file.stat().st_size for file in run_folder.glob("checkpoints/*/*") if file.is_file())
    needed = max(checkpoint, number * checkpoint - held) + adapter + SPARE_BYTES
    free = shutil.disk_usage(existing(run_folder)).free
    if needed > free:
        raise StorageError(
            f"{run_folder}: the run needs {needed / 1e9:.2f} GB there ({number} checkpoints of {checkpoint / 1e9:.2f} GB, the "
            f"result {adapter / 1e9:.2f} GB), and {free / 1e9:.2f} GB are free. Free space, lower callbacks.checkpoint.keep or "
            "method.rank, or choose another run_dir."
        )


def _sizes(cfg: Mapping[str, Any], model_folder: Path) -> tuple[int, int]:
    """Return the bytes of a checkpoint and of the final weights; zeros where the model's shape is not known."""
    try:
        shape = read_shape(model_folder, trust_remote_code=cfg["model"]["trust_remote_code"])
    except UnknownShape:
        return 0, 0
    weights = num_trained(cfg["method"], shape)
    moments = MOMENT_BYTES.get(cfg["optim"]["_target_"].rpartition(".")[2], 8)
    return weights * (VALUE_BYTES + moments), weights * VALUE_BYTES


def num_trained(method: Mapping[str, Any], shape: ModelShape) -> int:
    """Count the weights that train, new tokens aside."""
    if method["trains"] == "all":
        return shape.linear_weights + shape.other
    layers = adapted_layers(method["target_modules"], shape)
    return sum(shape.num_layers * method["rank"] * (one.in_features + one.out_features) for one in layers)


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest of those above it that is there."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())
