"""`train`: check everything, then let Hydra serve one run or a sweep."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig

from fine_tune.allocator import let_segments_grow
from fine_tune.cli.verb import tell, tell_stopped, tell_unexpected
from fine_tune.config import check_config, find_conf_dir
from fine_tune.errors import ConfigError, FineTuneError
from fine_tune.overrides import for_hydra, group_options
from fine_tune.redaction import secret_in_override
from fine_tune.showing import help_text
from fine_tune.sweeps.record import SweepFolder
from fine_tune.sweeps.spec import SEARCH, SweepSpec, read_sweep
from fine_tune.sweeps.workers import leave_the_group
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
        if any(flag in ("--help", "-h") for flag in flags):
            print(help_text(overrides))
            return 0
        if any(flag.partition("=")[0] in SHOW for flag in flags):
            return _serve(words)
        if any(flag in SWEEP for flag in flags):
            return _sweep(overrides)
        check_config(overrides)
        return _serve(for_hydra(overrides, group_options(find_conf_dir())))
    except FineTuneError as error:
        return tell(error)
    except KeyboardInterrupt as stopped:
        return tell_stopped(stopped)


def run_job(overrides: Sequence[str]) -> int:
    """Check the overrides of one run, run it, and return its exit code."""
    checked = check_config(overrides)
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


def _serve(words: Sequence[str]) -> int:
    """Hand the command line of one run to Hydra and return the exit code that it ends with."""
    typed = sys.argv

    def job(_: Any) -> None:
        # Lightning starts the other processes of DDP with sys.argv, which must be what the user typed.
        sys.argv = typed
        try:
            # Not the config that Hydra composed: what a typed value replaces is still in that one.
            code = run_job(list(HydraConfig.get().overrides.task))
        except FineTuneError as error:
            code = tell(error)
        except Exception as error:
            code = tell_unexpected(error)
        # SystemExit passes through Hydra untouched.
        sys.exit(code)

    return _hydra(words, job)


def _hydra(words: Sequence[str], job: Callable[[Any], None]) -> int:
    entry = hydra.main(version_base="1.3", config_path=str(find_conf_dir()), config_name="train")(job)
    typed = sys.argv
    sys.argv = [typed[0], *words]
    try:
        entry()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = typed
    return 0


def _sweep(overrides: Sequence[str]) -> int:
    """Check every job, run them all, and show the board; several processes of torchrun share the jobs."""
    spec = read_sweep(overrides)
    rank, size = leave_the_group()
    if size > 1 and (spec.kind == SEARCH or spec.launcher not in (None, "basic")):
        what = "a search learns from one trial to the next" if spec.kind == SEARCH else "the launcher starts processes of its own"
        raise ConfigError(f"torchrun: {what}. Start one process, without torchrun.")
    if rank == 0:
        number = f"{len(spec.jobs)} runs" if spec.jobs else "a search"
        print(f"{spec.name}: {number}, every config checked", file=sys.stderr)
    let_segments_grow()
    wait_politely()
    # The first import of torch, after everything that can be refused without it.
    from fine_tune.sweeps.search import run_search
    from fine_tune.sweeps.sweep import finish, open_sweep, run_grid

    sweep = open_sweep(spec, ["python", "train.py", "-m", *overrides])
    if spec.kind == SEARCH:
        run_search(spec, sweep)
    elif spec.launcher in (None, "basic"):
        run_grid(spec, sweep, rank=rank)
    else:
        _launch(spec, sweep)
        # What another process had when a launcher came to it.
        run_grid(spec, sweep, rank=0)
    return finish(spec, sweep) if rank == 0 else 0


def _launch(spec: SweepSpec, sweep: SweepFolder) -> None:
    """Let a launcher of Hydra start the jobs, in processes of its own or on a cluster."""
    words = for_hydra(spec.words, group_options(find_conf_dir()))
    # Not in the working directory; and what Hydra writes there holds the words of the sweep, none of which is a secret.
    place = spec.folder / "launcher"

    def job(_: Any) -> None:
        from fine_tune.sweeps.sweep import grid_job

        grid_job(spec, sweep, int(HydraConfig.get().job.num))

    with _environment("HYDRA_FULL_ERROR", "1"):
        _hydra(["-m", *words, f"hydra.sweep.dir='{place}'"], job)
    (place / "multirun.yaml").unlink(missing_ok=True)


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
