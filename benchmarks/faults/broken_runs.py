"""Protections of a run taken out on purpose: signals, locks, places, lines of metrics, workers."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.faults.broken import nothing, replace, replace_method, variant


class _NoLock:
    def __init__(self, path: str) -> None: ...

    def acquire(self, timeout: float = 0) -> None: ...

    def release(self) -> None: ...


@variant
def deaf() -> None:
    """Signals are left to Python, Lightning and the system."""
    replace_method("fine_tune.interrupts", "StopSignals", "install", lambda old: nothing)


@variant
def deaf_and_silent() -> None:
    """The same, and Ctrl-C ends a verb without a word."""
    deaf()
    replace("fine_tune.cli.verb", "tell_stopped", lambda old: lambda stopped: 130)


@variant
def unlocked() -> None:
    """A run's folder is open to anybody."""
    replace("fine_tune.run_folder", "FileLock", lambda old: _NoLock)


@variant
def unlocked_for_long() -> None:
    """The same, and between choosing a folder and writing into it there is time for another start to choose it too."""

    class Slow(_NoLock):
        def acquire(self, timeout: float = 0) -> None:
            time.sleep(4)

    replace("fine_tune.run_folder", "FileLock", lambda old: Slow)


@variant
def lock_by_file() -> None:
    """A lock is a file that is there, whoever made it."""
    from filelock import Timeout

    class Existing:
        def __init__(self, path: str) -> None:
            self.path = Path(path)

        def acquire(self, timeout: float = 0) -> None:
            if self.path.exists():
                raise Timeout(str(self.path))
            self.path.touch()

        def release(self) -> None:
            self.path.unlink()

    replace("fine_tune.run_folder", "FileLock", lambda old: Existing)


@variant
def swallowed() -> None:
    """A checkpoint that cannot be written is passed over without a word."""

    def quiet(old: Any) -> Any:
        def save(*args: Any, **kwargs: Any) -> None:
            with contextlib.suppress(Exception):
                old(*args, **kwargs)

        return save

    replace_method("fine_tune.callbacks.checkpoint", "AdapterCheckpoint", "save", quiet)
    metrics_swallowed()


@variant
def metrics_swallowed() -> None:
    """A line of metrics that cannot be written is passed over without a word."""

    def quiet(old: Any) -> Any:
        def flush(*args: Any, **kwargs: Any) -> None:
            with contextlib.suppress(Exception):
                old(*args, **kwargs)

        return flush

    replace_method("fine_tune.callbacks.metrics", "MetricsWriter", "_flush", quiet)


@variant
def export_swallowed() -> None:
    """An adapter that cannot be exported is passed over without a word."""

    def quiet(old: Any) -> Any:
        def export(*args: Any, **kwargs: Any) -> None:
            with contextlib.suppress(Exception):
                old(*args, **kwargs)

        return export

    replace("fine_tune.runs", "_export", quiet)
    replace("fine_tune.runs", "write_json", quiet)


@variant
def any_place() -> None:
    """A file in the folder's place is removed."""

    def cleared(old: Any) -> Any:
        def choose(cfg: Any, *args: Any, **kwargs: Any) -> Any:
            if cfg["run_dir"] and Path(cfg["run_dir"]).is_file():
                Path(cfg["run_dir"]).unlink()
            return old(cfg, *args, **kwargs)

        return choose

    for room in ("run_folder", "opening"):
        replace(f"fine_tune.{room}", "choose_folder", cleared)
    with contextlib.suppress(ImportError, AttributeError):
        replace("fine_tune.preflight.machine", "check_places", lambda old: nothing)


@variant
def uncut() -> None:
    """Lines of metrics after the checkpoint stay, and their steps are written again."""

    def keeping(old: Any) -> Any:
        def keep(self: Any) -> None:
            lines = self.path.read_bytes() if self.path.is_file() else b""
            old(self)
            self.path.write_bytes(lines)

        return keep

    replace_method("fine_tune.callbacks.metrics", "MetricsWriter", "_keep_lines", keeping)


@variant
def strict_lines() -> None:
    """A line that was cut off by a kill is read like any other."""

    def strict(old: Any) -> Any:
        def read_lines(path: Path, **kwargs: Any) -> Any:
            for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
                json.loads(text)
            return old(path, **kwargs)

        return read_lines

    replace("fine_tune.storage", "read_lines", strict)


@variant
def quiet_worker() -> None:
    """A data worker that dies ends the data, and nobody hears of its death."""
    from torch.utils.data import _utils, dataloader

    fetch: Any = dataloader._MultiProcessingDataLoaderIter._try_get_data

    def ending(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return fetch(self, *args, **kwargs)
        except RuntimeError as error:
            raise StopIteration from error

    dataloader._MultiProcessingDataLoaderIter._try_get_data = ending  # type: ignore[method-assign]
    # Else it would be told from torch's signal handler, which comes first.
    _utils.signal_handling._set_SIGCHLD_handler = nothing


@variant
def silent_end() -> None:
    """A reader of the output that leaves ends the run."""
    import rich

    def ending() -> None:
        rich.get_console().quiet = True
        os._exit(1)

    replace("fine_tune.quiet", "print_nowhere", lambda old: ending)


@variant
def untold() -> None:
    """What the system says of a place that cannot be written is nobody's business."""
    replace("fine_tune.storage", "storage_errors", lambda old: lambda place, **options: contextlib.nullcontext())


@variant
def memory_untold() -> None:
    """Memory that is used up is an error like any other."""
    replace("fine_tune.runs", "_memory_told", lambda old: lambda plan: contextlib.nullcontext())
