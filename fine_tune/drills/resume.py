"""A run that was killed and resumed, beside the same run that was not: the user's own config, a few steps of it."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fine_tune import checkpoints, safe_load
from fine_tune.drills.children import run_to_end, run_until
from fine_tune.drills.finding import Differs, Drilled, Finding, tell
from fine_tune.drills.gaps import Gap, gap, lines_gap
from fine_tune.drills.words import run_words
from fine_tune.storage import read_lines

# What a clock decides, or the memory of other processes.
TIMED = frozenset({"tokens_per_second", "samples_per_second", "step_seconds", "mfu"})
# What is a function of the step alone: the same on any device.
COUNTED = frozenset({"step", "epoch", "learning_rate", "samples", "tokens", "supervised_tokens"})
# On a GPU: how much further apart than two straight runs a resumed one may be, and what is always allowed (relative).
FACTOR = 4.0
FLOOR = {"32-true": 1e-5, "bf16-mixed": 1e-3, "16-mixed": 1e-3}
# A fast machine may be through before it is killed.
TRIES = 3


@dataclass(frozen=True)
class Runs:
    """The runs of a drill, all in one folder."""

    folder: Path
    words: Sequence[str]
    steps: int
    num_ranks: int

    def __getitem__(self, name: str) -> Path:
        """Return a run's folder."""
        return self.folder / name

    def start(self, name: str) -> None:
        """Do a run from its first step to its last."""
        self._told(name, [*self.words, f"run_dir={self[name]}"], f"{self.steps} steps without a stop")

    def resume(self, name: str, what: str) -> None:
        """Go on to the last step."""
        # Code of a model's own is run only where it is typed, also when a run goes on.
        code = [word for word in self.words if word.lstrip("+").startswith("model.trust_remote_code=")]
        self._told(name, [f"resume={self[name]}", *code], what)

    def kill(self, name: str, *, after: int) -> int:
        """Start a run, kill it once a step is done and a checkpoint is whole, and return the last step it has told.

        Raises:
            Differs: It was always over before it could be killed.
        """
        words, log = [*self.words, f"run_dir={self[name]}"], self.folder / f"{name}.log"
        for tried in range(TRIES):
            due = functools.partial(self._due, name, max(1, after - tried))
            if run_until(words, log, due, num_ranks=self.num_ranks):
                return _last_step(self[name])
            shutil.rmtree(self[name])
        raise Differs(f"steps={self.steps}: the run was over before it could be killed. Pass more steps.")

    def _due(self, name: str, after: int) -> bool:
        whole = any((self[name] / "checkpoints").glob("step-*/manifest.json"))
        return whole and _last_step(self[name]) >= after

    def _told(self, name: str, words: Sequence[str], what: str) -> None:
        log = self.folder / f"{name}{'.resumed' if words[0].startswith('resume=') else ''}.log"
        seconds = run_to_end(words, log, num_ranks=self.num_ranks)
        tell(f"{name:<10} {what}: {seconds:.1f} s")


def drill_resume(words: Sequence[str], cfg: Mapping[str, Any], *, folder: Path, steps: int) -> Drilled:
    """Run a config straight, killed and resumed, and as a control resumed without the optimizer's state; compare the ends.

    Args:
        words: Words of `train`.
        cfg: The checked config that they make.
        folder: An empty folder, where everything stays.
        steps: Optimizer steps of each run.

    Raises:
        ChildFailed: A run ended with an error.
    """
    trainer = cfg["trainer"]
    exact = trainer["accelerator"] == "cpu" or not torch.cuda.is_available()
    runs = Runs(folder, run_words(words, cfg, steps=steps, save_every=max(1, steps // 3)), steps, trainer["devices"])
    runs.start("straight")
    if not exact:
        # Kernels of a GPU add in an order of their own: how far apart two straight runs are is the measure.
        runs.start("again")
    killed = runs.kill("killed", after=steps // 2)
    newest, _ = checkpoints.latest(runs["killed"] / "checkpoints")
    if newest is None:
        raise Differs(f"{runs['killed']}: no valid checkpoint was left by the kill.")
    tell(f"{'killed':<10} SIGKILL after step {killed}; newest whole checkpoint: step {newest.step}")
    forget_optimizer(runs["killed"], runs["forgetful"])
    runs.resume("killed", f"resumed at step {newest.step}")
    runs.resume("forgetful", f"resumed at step {newest.step} without the optimizer's state, as a control")
    return _judge(runs, exact=exact, killed=killed, kept=newest.step)


def forget_optimizer(run: Path, copy: Path) -> None:
    """Copy a run that can be resumed, and empty its optimizer's state: what a save of the adapter alone would leave."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns(".lock"))
    root = copy / "checkpoints"
    for one in checkpoints.valid_checkpoints(root)[0]:
        state = one.trainer_state()
        state["optimizer"]["state"] = {}
        record = {key: value for key, value in one.manifest.items() if key not in ("step", "files")}
        checkpoints.save(root, one.step, adapter=one.adapter(), trainer=state, record=record)


def _judge(runs: Runs, *, exact: bool, killed: int, kept: int) -> Drilled:
    straight = end_of(runs["straight"], runs.steps)
    found = compare(straight, end_of(runs["killed"], runs.steps))
    summary = json.loads((runs["straight"] / "summary.json").read_text(encoding="utf-8"))
    noise: dict[str, Gap] = {} if exact else compare(straight, end_of(runs["again"], runs.steps))
    floor = 0.0 if exact else FLOOR[summary["precision"]]
    bounds = {name: 0.0 if exact or name in ALWAYS_EXACT else max(floor, FACTOR * noise[name].size) for name in found}
    findings = [
        Finding(name, {"": one.size}, {"": bounds[name]}, _detail(one))
        for name, one in found.items()
        if one.compared
    ]
    forgetful = compare(straight, end_of(runs["forgetful"], runs.steps))["adapter"]
    control = "control: resumed without the optimizer's state"
    findings.append(Finding(control, {"": forgetful.size}, {"": bounds["adapter"]}, "adapter", is_control=True))
    lines = [f"Killed after step {killed} of {runs.steps}, resumed at step {kept}; steps done again: {killed - kept}."]
    if exact:
        lines.append("On a CPU the end must be the same bit for bit.")
    else:
        lines.append(
            f"On a GPU sums are added in an order that varies. Allowed is {FACTOR:g} times what two straight runs differ by, "
            f"and {floor:g} at least; counts, rates and random states must be the same."
        )
    facts = {
        "device": summary["device"], "precision": summary["precision"], "steps": runs.steps, "killed_after_step": killed,
        "resumed_at_step": kept, "two_straight_runs": {name: one.size for name, one in noise.items()},
    }  # fmt: skip
    return Drilled("resume", runs.folder, findings, facts, lines)


ALWAYS_EXACT = ("schedule", "random states", "counters", "metrics.jsonl: counts and rates")


def end_of(run: Path, step: int) -> dict[str, Any]:
    """Read everything that a run ended with."""
    end = checkpoints.verify(run / "checkpoints" / f"step-{step:07d}")
    state = end.trainer_state()
    counters = {key: state[key] for key in ("step", "skipped_steps", "precision")}
    callbacks = dict(state["callbacks"])
    # Seconds differ between any two runs; what they were spent on must not.
    counters["throughput"] = {k: v for k, v in callbacks.pop("Throughput", {}).items() if k != "seconds"}
    exported = {file.name: safe_load.tensors(file) for file in sorted((run / "adapter").glob("*.safetensors"))}
    return {
        "adapter": end.adapter(),
        "adapter, as exported": exported,
        "optimizer state": state["optimizer"],
        "schedule": state["schedule"],
        "random states": state["rng"],
        "counters": counters,
        "callbacks": callbacks,
        "metrics": read_lines(run / "metrics.jsonl"),
    }


def compare(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, Gap]:
    """Compare the ends of two runs, part by part."""
    found = {name: gap(left[name], right[name]) for name in left if name != "metrics"}
    lines = left["metrics"], right["metrics"]
    found["metrics.jsonl: counts and rates"] = lines_gap(*lines, keys=COUNTED, only=True)
    found["metrics.jsonl: losses and norms"] = lines_gap(*lines, keys=COUNTED | TIMED, only=False)
    return found


def _detail(one: Gap) -> str:
    return f"{one.compared:,} compared" + (f"; most in {one.where}" if one.where else "")


def _last_step(run: Path) -> int:
    return max((line["step"] for line in read_lines(run / "metrics.jsonl")), default=0)
