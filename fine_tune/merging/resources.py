"""What a merge uses: this process's peak of memory, space on the disk."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from fine_tune.errors import StorageError

# Files beside the weights, and what a file system keeps for itself.
SPARE_BYTES = 64_000_000


def peak_rss() -> int | None:
    """Return the most memory that this process held at a time, in bytes, since the last :func:`forget_peak`."""
    return _first_number(Path("/proc/self/status"), "VmHWM:")


def forget_peak() -> None:
    """Begin to measure the peak anew, where the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _first_number(file: Path, name: str) -> int | None:
    with suppress(OSError, ValueError, IndexError):
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return None


def check_disk(out: Path, num_bytes: int) -> None:
    """Refuse a merge that would fill the disk, before anything is written.

    Raises:
        StorageError: There is less space than it needs.
    """
    place = next(folder for folder in (out, *out.resolve().parents) if folder.is_dir())
    free, needed = shutil.disk_usage(place).free, num_bytes + SPARE_BYTES
    if needed > free:
        raise StorageError(
            f"out={out}: the merged model needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free. Free space, pass "
            "another out=, or dtype=bfloat16."
        )
