"""`train`: check everything, then let Hydra serve one run or a sweep."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from fine_tune.allocator import let_segments_grow
from fine_tune.config import check_config, check_sweep, find_conf_dir
from fine_tune.errors import ConfigError, FineTuneError
from fine_tune.overrides import for_hydra, group_options
from fine_tune.redaction import secret_in_override
from fine_tune.threads import wait_politely

# Flags that show something and start nothing: Hydra answers them.
SHOW = (
    "--help",
    "-h",
    "--hydra-help",
    "--version",
    "--cfg",
    "-c",
    "--info",
    "-i",
    "--shell-completion",
    "-sc",
)
SWEEP = ("--multirun", "-m")
WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--info", "-i", "--shell-completion", "-sc")
FLAGS = (*SHOW, *SWEEP, "--run", "-r", "--resolve", "--package", "-p")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the train verb and return its exit code.

    Every problem of the config is told on stderr before torch is imported or a folder is made.

    Args:
        argv: Words after the verb; None takes those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        flags, overrides = _split(words)
        if any(flag.partition("=")[0] in SHOW for flag in flags):
            return _serve(words)
        if any(flag in SWEEP for flag in flags):
            return _sweep(overrides)
        check_config(overrides)
        return _serve(for_hydra(overrides, group_options(find_conf_dir())))
    except FineTuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def run_job(overrides: Sequence[str], *, multirun: bool = False) -> int:
    """Check the overrides of one job, run it, and return its exit code."""
    checked = check_config(overrides, multirun=multirun)
    let_segments_grow()
    wait_politely()
    # The first import of torch, after everything that can be refused without it.
    from fine_tune.runs import run

    run(checked.cfg, overrides=[text.lstrip("+") for text in overrides])
    return 0


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part flags (each with its value) from overrides, and refuse flags that are not ours to pass on."""
    flags: list[str] = []
    overrides: list[str] = []
    for position, word in enumerate(words):
        is_value = position > 0 and words[position - 1] in WITH_VALUE and "=" not in word
        (flags if word.startswith("-") or is_value else overrides).append(word)
    if any(secret_in_override(word) for word in flags):
        raise ConfigError(
            "a flag looks like a secret (not shown). Set HF_TOKEN or WANDB_API_KEY in the environment."
        )
    named = [flag.partition("=")[0] for flag in flags if flag.startswith("-")]
    # Not passed on: --experimental-rerun unpickles a file; another config folder is not what was checked.
    known = ", ".join(flag for flag in FLAGS if flag.startswith("--"))
    if unknown := [flag for flag in named if flag not in FLAGS]:
        raise ConfigError(
            [
                f"{flag}: not a flag of train. Write values as key=value; flags are {known}."
                for flag in unknown
            ]
        )
    return flags, overrides


def _sweep(overrides: Sequence[str]) -> int:
    jobs = check_sweep(overrides)
    print(f"sweep: {len(jobs)} runs, every config checked", file=sys.stderr)
    words = for_hydra(overrides, group_options(find_conf_dir()))
    # Hydra's sweeper writes the raw overrides to multirun.yaml; each run keeps a redacted config of its own.
    with (
        tempfile.TemporaryDirectory(prefix="fine_tune_sweep_") as folder,
        _environment("HYDRA_FULL_ERROR", "1"),
    ):
        return _serve(["-m", *words, f"hydra.sweep.dir='{folder}'"])


def _serve(words: Sequence[str]) -> int:
    """Hand a command line to Hydra and return the exit code that its jobs end with."""
    typed = sys.argv

    def job(_: Any) -> None:
        # Lightning starts the other processes of DDP with sys.argv, which must be what the user typed.
        sys.argv = typed
        state = HydraConfig.get()
        multirun = state.mode == RunMode.MULTIRUN
        try:
            # Not the config that Hydra composed: what a typed value replaces is still in that one.
            code = run_job(list(state.overrides.task), multirun=multirun)
        except FineTuneError as error:
            print(error, file=sys.stderr)
            if multirun and error.exit_code not in (130, 143):
                raise  # the other jobs go on; the first failure becomes the exit code
            code = error.exit_code
        if code or not multirun:
            # SystemExit passes through Hydra untouched, so an interrupted job also ends its sweep.
            sys.exit(code)

    entry = hydra.main(version_base="1.3", config_path=str(find_conf_dir()), config_name="train")(job)
    sys.argv = [typed[0], *words]
    try:
        entry()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = typed
    return 0


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set a variable for a while; with HYDRA_FULL_ERROR a job's error reaches us and is not printed raw."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
