"""What a sweep is, from the words after ``-m``: its jobs or its search, and the folder of its record."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fine_tune.config import check_config, check_jobs
from fine_tune.errors import ConfigError
from fine_tune.overrides import Varied, expand, varied
from fine_tune.run_folder import default_name

GRID, SEARCH = "grid", "search"
# Words that decide where and how jobs run, and not which ones there are.
NOT_NAMED = ("sweep_dir", "overwrite", "logger", "hydra", "sweep.num_trials")
METRICS = ("val/loss", "exact_match", "final_loss", "preference_accuracy", "reward_margin", "train_loss")


@dataclass(frozen=True)
class SweepSpec:
    """A checked sweep.

    Attributes:
        words: The words of all jobs, varied ones included.
        jobs: The words of each job of a grid; none for a search.
        varied: The keys that differ between jobs.
        settings: The values of ``sweep=``; None when the sweep was typed.
        runs: Folder that holds the runs.
        folder: Folder of the sweep's own record.
        overwrite: Everything is done anew.
        launcher: What Hydra was told to start jobs with; None for one after another in this process.
    """

    words: list[str]
    jobs: list[list[str]]
    varied: list[Varied]
    settings: dict[str, Any] | None
    runs: Path
    folder: Path
    launcher: str | None
    overwrite: bool

    @property
    def kind(self) -> str:
        """``grid`` or ``search``."""
        return GRID if self.settings is None else str(self.settings["kind"])

    @property
    def name(self) -> str:
        """Name of the sweep: that of its folder."""
        return self.folder.name


def read_sweep(overrides: Sequence[str]) -> SweepSpec:
    """Read and check a whole sweep before anything starts.

    Raises:
        ConfigError: All problems of all jobs together.

    Example:
        >>> [job[0] for job in read_sweep(["method.rank=4,8"]).jobs]
        ['method.rank=4', 'method.rank=8']
    """
    own = [word for word in overrides if _key(word) == "sweep" or _key(word).startswith("sweep.")]
    rest = [word for word in overrides if word not in own]
    settings = check_config(own, multirun=True).cfg.get("sweep") if own else None
    typed = {_key(word) for word in rest}
    params = (settings or {}).get("params", {})
    words = [*(f"{key}={value}" for key, value in params.items() if key not in typed), *rest]
    found = varied(words)
    search = settings is not None and settings["kind"] == SEARCH
    if problems := _problems(found, settings, search=search):
        raise ConfigError(problems)
    jobs = _corners(words, found) if search else expand(words)
    checked = [job.cfg for job in check_jobs(jobs)]
    if problems := list(_clashes(jobs, checked, found)):
        raise ConfigError(problems)
    runs = Path(checked[0]["sweep_dir"]).expanduser()
    launcher = next((word.partition("=")[2] for word in words if _key(word) == "hydra/launcher"), None)
    folder, overwrite = runs / _name(words, own), checked[0]["overwrite"]
    return SweepSpec(words, [] if search else jobs, found, settings, runs, folder, launcher, overwrite)


def job_words(words: Sequence[str], chosen: dict[str, str]) -> list[str]:
    """Return the words of one job of a search: what it varies replaced by what was chosen."""
    return [f"{_key(word)}={chosen[_key(word)]}" if _key(word) in chosen else word for word in words]


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")


def _problems(found: list[Varied], settings: dict[str, Any] | None, *, search: bool) -> list[str]:
    if shuffled := [one.key for one in found if one.shuffled]:
        rule = "jobs are numbered, so their order must be the same each time"
        return [f"{key}: shuffle(..): {rule}. Leave it out." for key in shuffled]
    if not search:
        advice = "a grid has no values for it. List values, or pass sweep=optuna"
        return [f"{one.key}: from {one.low:g} to {one.high:g}: {advice}." for one in found if not one.values]
    assert settings is not None
    problems = [] if found else ["sweep: nothing varies. Pass values, such as method.rank=8,16 or optim.lr=interval(1e-5,1e-3)."]
    needed = ("metric", "direction", "num_trials", "sampler", "pruner", "startup_trials", "warmup_steps", "seed")
    missing = [key for key in needed if settings[key] is None]
    problems += [f"sweep.{key}: no value, and a search needs one. See conf/sweep/optuna.yaml." for key in missing]
    for one in found:
        if not one.values and not (one.low < one.high and (one.low > 0 or not one.log)):
            problems.append(f"{one.key}: interval({one.low:g}, {one.high:g}): must go up, with tag(log, ..) from above 0.")
    metric = settings["metric"]
    if metric is not None and not metric.startswith("val/") and metric not in METRICS:
        problems.append(f"sweep.metric = {metric}: no such metric. Choose val/<name> or one of {', '.join(METRICS)}.")
    return problems


def _clashes(jobs: list[list[str]], checked: list[dict[str, Any]], found: list[Varied]) -> Iterator[str]:
    """Say which jobs would be one run, as they differ in nothing that decides a result, and where runs would be scattered."""
    if len({cfg["sweep_dir"] for cfg in checked}) > 1:
        yield "sweep_dir: one folder holds the runs of a sweep. Name one."
    keys = {one.key for one in found}
    names: dict[str, str] = {}
    for job, cfg in zip(jobs, checked, strict=True):
        shown = " ".join(word for word in job if _key(word) in keys)
        name = cfg["run_name"] or default_name(cfg, "")
        if name in names:
            yield f"{shown}: the same run as {names[name]}: nothing that decides its result differs. Leave one out."
        names[name] = shown


def _corners(words: list[str], found: list[Varied]) -> list[list[str]]:
    """Every value of each key once, with the first ones of the others: what a search can ask for, checked one by one."""
    choices = [list(one.values) or [number(one, one.low), number(one, one.high)] for one in found]
    keys = [one.key for one in found]
    first = [values[0] for values in choices]
    picked = [first]
    for place, values in enumerate(choices):
        picked += [[*first[:place], value, *first[place + 1 :]] for value in values[1:]]
    return [job_words(words, dict(zip(keys, values, strict=True))) for values in picked]


def number(one: Varied, value: float) -> str:
    """Write a value of an interval as a word's value; digits enough to read back the same number."""
    return str(round(value)) if one.whole else repr(float(value))


def _name(words: Sequence[str], own: Sequence[str]) -> str:
    kept = sorted(word.lstrip("+") for word in itertools.chain(words, own) if not _key(word).startswith(NOT_NAMED))
    return f"sweep-{hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:8]}"
