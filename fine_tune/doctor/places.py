"""Memory, disks, caches, and the variables that decide whether the network is asked."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from fine_tune.data.cache import cache_folder
from fine_tune.doctor.finding import Finding, State

GB = 1e9
# Below these a run of a 7B model has no room: its weights and a checkpoint, and loading them.
LITTLE_DISK_GB, LITTLE_MEMORY_GB = 5.0, 4.0
WALK_SECONDS = 0.5
FLAGS = (
    "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "FINE_TUNE_CACHE", "WANDB_MODE",
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WORLD_SIZE",
)  # fmt: skip
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")


def place_findings() -> Iterator[Finding]:
    """Look at memory, disks, caches and variables."""
    yield _memory()
    yield from _disks()
    yield _caches()
    flags = {name: os.environ[name] for name in FLAGS if name in os.environ}
    said = (
        ", ".join(f"{name}={value}" for name, value in flags.items()) or "none that matter are set; the hub is asked."
    )
    yield Finding("variables", "ok", said, flags)


def _memory() -> Finding:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = int(MEMORY_LIMIT.read_text(encoding="ascii"))
    except (OSError, ValueError):
        limit = total
    free = _available()
    values = {"total_gb": min(total, limit) / GB, "available_gb": None if free is None else min(free, limit) / GB}
    says = f"{values['total_gb']:.1f} GB" + ("" if free is None else f", {values['available_gb']:.1f} GB available")
    little = free is not None and min(free, limit) / GB < LITTLE_MEMORY_GB
    return Finding("memory", "look" if little else "ok", f"{says}.", values)


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None


def _disks() -> Iterator[Finding]:
    wanted = {
        "runs/": Path("runs").absolute(),
        "data cache": cache_folder(None),
        "hub cache": hub_cache(),
        "temporary": Path(tempfile.gettempdir()),
    }
    by_free: dict[tuple[int, int], list[str]] = {}
    for name, folder in wanted.items():
        place = next(place for place in (folder, *folder.parents) if place.exists())
        if not os.access(place, os.W_OK):
            needed = name == "runs/"
            says = f"{name} ({place}) cannot be written." + (" Start elsewhere, or pass run_dir=." if needed else "")
            yield Finding("disk", "broken" if needed else "look", says)
        by_free.setdefault((place.stat().st_dev, shutil.disk_usage(place).free), []).append(name)
    for (_, free), names in by_free.items():
        state: State = "look" if free / GB < LITTLE_DISK_GB else "ok"
        yield Finding(
            "disk", state, f"{free / GB:.1f} GB free for {', '.join(names)}.", {"free_gb": free / GB, "for": names}
        )


def _caches() -> Finding:
    folders = {"data": cache_folder(None), "hub": hub_cache()}
    sizes = {name: (folder, *size_of(folder)) for name, folder in folders.items()}
    said = [
        f"{name} {'over ' if partial else ''}{size / GB:.2f} GB in {folder}"
        for name, (folder, size, partial) in sizes.items()
    ]
    return Finding(
        "caches",
        "ok",
        ", ".join(said),
        {name: {"folder": str(f), "gb": size / GB} for name, (f, size, _) in sizes.items()},
    )


def hub_cache() -> Path:
    """Where the hub's client keeps what it fetched."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def size_of(folder: Path) -> tuple[int, bool]:
    """Return the bytes below a folder, and whether there was no time to count all of them."""
    until, size = time.monotonic() + WALK_SECONDS, 0
    for place, _, files in os.walk(folder):
        for name in files:
            size += _bytes(os.path.join(place, name))
        if time.monotonic() > until:
            return size, True
    return size, False


def _bytes(file: str) -> int:
    try:
        # Links of the hub's cache lead to files that are counted where they are.
        return os.lstat(file).st_size
    except OSError:
        return 0
