"""A search: Optuna proposes values, each trial is a job, and poor ones are stopped early."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fine_tune.errors import ConfigError, EnvironmentProblem, RunLocked
from fine_tune.opening import say
from fine_tune.overrides import Varied
from fine_tune.sweeps.jobs import do_job
from fine_tune.sweeps.record import FAILED, FINISHED, PRUNED, JobRecord, SweepFolder
from fine_tune.sweeps.spec import SweepSpec, job_words, number
from fine_tune.sweeps.sweep import KEPT
from fine_tune.watching import Pruned, Watcher

# A trial's attribute: the number of the one whose process was killed, and whose values it tries again.
INSTEAD_OF = "instead of"
# What validation loss is called in summary.json.
IN_SUMMARY = {"val/loss": "final_loss"}


class _Pruning(Watcher):
    """Tell a trial what validations found, and stop the run when the pruner has seen enough."""

    def __init__(self, trial: Any, metric: str) -> None:
        self.trial, self.metric = trial, metric

    def validated(self, step: int, values: Mapping[str, float]) -> None:
        if self.metric not in values or step == 0:
            return  # before the first step all trials are the same
        self.trial.report(values[self.metric], step)
        if self.trial.should_prune():
            raise Pruned(f"{self.metric} of {values[self.metric]:.4g} after step {step} is worse than the earlier trials' median")


def run_search(spec: SweepSpec, sweep: SweepFolder) -> None:
    """Ask for trials until there are as many as wanted; what a killed process left open is tried again.

    Raises:
        EnvironmentProblem: Optuna is not installed.
        RunLocked: Another process is at it.
    """
    optuna = _optuna()
    settings = spec.settings or {}
    lock = FileLock(str(sweep.path / ".search.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunLocked(f"{sweep.path} is being searched by another process. Wait for it.") from error
    try:
        study = _study(optuna, spec, sweep)
        _take_up(optuna, study)
        while _num_ended(optuna, study) < settings["num_trials"]:
            _trial(optuna, study, spec, sweep)
    finally:
        lock.release()


def _trial(optuna: Any, study: Any, spec: SweepSpec, sweep: SweepFolder) -> None:
    """Run one trial as the job of its number, and tell the study how it ended."""
    settings = spec.settings or {}
    trial = study.ask()
    chosen = {one.key: suggest(trial, one) for one in spec.varied}
    shown = " ".join(f"{key}={value}" for key, value in chosen.items())
    title = f"trial {trial.number + 1} (of {settings['num_trials']}): {shown}"
    pruning = _Pruning(trial, settings["metric"]) if settings["pruner"] != "none" else None
    record = do_job(sweep, trial.number, job_words(spec.words, chosen), kept=KEPT, title=title, watcher=pruning)
    states = optuna.trial.TrialState
    value = None if record is None else value_of(spec.runs, record, settings["metric"])
    if record is not None and record.status == PRUNED:
        study.tell(trial, state=states.PRUNED)
    elif value is None:
        if record is not None and record.status == FINISHED:
            reason = f"the run has no {settings['metric']} to be judged by. Choose another sweep.metric."
            sweep.write(replace(record, status=FAILED, exit_code=ConfigError.exit_code, error="ConfigError", reason=reason))
            say(f"trial {trial.number + 1}: {reason}")
        study.tell(trial, state=states.FAIL)
    else:
        study.tell(trial, value)


def suggest(trial: Any, one: Varied) -> str:
    """Let a trial choose a value, as the word's value."""
    if one.values:
        return str(trial.suggest_categorical(one.key, list(one.values)))
    if one.whole:
        return number(one, trial.suggest_int(one.key, round(one.low), round(one.high), log=one.log))
    return number(one, trial.suggest_float(one.key, one.low, one.high, log=one.log))


def value_of(runs: Path, record: JobRecord, metric: str) -> float | None:
    """Read what a finished job is judged by."""
    if record.status != FINISHED or record.run is None:
        return None
    summary = json.loads((runs / record.run / "summary.json").read_text(encoding="utf-8"))
    if metric in IN_SUMMARY or metric in summary:
        value = summary.get(IN_SUMMARY.get(metric, metric))
        return None if value is None else float(value)
    lines = (runs / record.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [line[metric] for line in map(json.loads, lines) if line.get(metric) is not None]
    return float(found[-1]) if found else None


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise EnvironmentProblem("sweep=optuna: Optuna is not installed. pip install 'fine-tune[search]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def _study(optuna: Any, spec: SweepSpec, sweep: SweepFolder) -> Any:
    """Open the study; its sampler goes on with other random numbers than those of the trials that are there."""
    settings = spec.settings or {}
    startup = settings["startup_trials"]
    pruners = {
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=startup, n_warmup_steps=settings["warmup_steps"]),
        "none": optuna.pruners.NopPruner,
    }
    storage = settings["storage"] or f"sqlite:///{sweep.path / 'trials.db'}"
    if spec.overwrite and spec.name in optuna.get_all_study_names(storage):
        optuna.delete_study(study_name=spec.name, storage=storage)
    study = optuna.create_study(
        storage=storage, study_name=spec.name, direction=settings["direction"], load_if_exists=True,
        pruner=pruners[settings["pruner"]](),
    )  # fmt: skip
    seed = settings["seed"] + len(study.get_trials(deepcopy=False))
    study.sampler = (
        optuna.samplers.RandomSampler(seed=seed)
        if settings["sampler"] == "random"
        else optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
    )
    return study


def _take_up(optuna: Any, study: Any) -> None:
    """Close the trials that a killed process left open, and queue their values: their runs go on where they were."""
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.enqueue_trial(trial.params, user_attrs={INSTEAD_OF: trial.number})
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)


def _num_ended(optuna: Any, study: Any) -> int:
    """Count trials; one whose process was killed has another in its place."""
    states = optuna.trial.TrialState
    trials = study.get_trials(deepcopy=False)
    replaced = {trial.user_attrs.get(INSTEAD_OF) for trial in trials}
    ended = (states.COMPLETE, states.PRUNED, states.FAIL)
    return sum(trial.state in ended and trial.number not in replaced for trial in trials)
