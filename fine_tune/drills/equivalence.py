"""The first steps of a config, taken in several ways that must give one loss and one gradient."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fine_tune.drills.finding import Drilled, Finding, quietly, tell
from fine_tune.drills.loaded import Loaded, layers_run, load, move, num_weights
from fine_tune.drills.ranks import RANKS, save_values, take_in_two
from fine_tune.drills.taking import Taken, alone, apart, as_two_sequences, leaking, uneven, whole
from fine_tune.errors import ConfigError
from fine_tune.models.execution import Execution
from fine_tune.models.hub import resolve_model
from fine_tune.packing.batches import MicroBatch, StepBatch
from fine_tune.quiet import quiet_libraries

# What rounding may move, relative, by what is computed in. In half precision a single gradient may be the small difference of large
# numbers: 0.17 was measured in LLaMA-2-7B's shape (k_proj of the last layer), where mistakes made on purpose move one by over 1.
FLOAT64, INT8 = "float64", "int8"
BOUNDS = {
    FLOAT64: {"loss": 1e-12, "gradients": 1e-9},
    "32-true": {"loss": 1e-5, "gradients": 1e-4},
    "bf16-mixed": {"loss": 1e-2, "gradients": 0.25},
    "16-mixed": {"loss": 1e-2, "gradients": 0.25},
    INT8: {"loss": 2e-2, "gradients": 0.25},
}
# A mistake must be so many times further away than rounding may be.
CLEAR = {FLOAT64: 1e5, "32-true": 100.0}
CLEAR_IN_HALF = 2.0
# Models of more weights are not also taken in float64 unless asked for.
SMALL = 100_000_000


@dataclass(frozen=True)
class Way:
    """One way to take a step: its name, the micro-batches, and how the layers run (None: as the run's own do)."""

    name: str
    deal: Callable[[Sequence[MicroBatch]], list[MicroBatch]]
    execution: Execution | None = None
    plain: bool = False
    mean_of_means: bool = False
    is_control: bool = False


@dataclass(frozen=True)
class Compared:
    """One way in one step, beside the step as the run takes it."""

    name: str
    step: int
    gaps: Mapping[str, float]
    where: str
    is_control: bool


def drill_equivalence(cfg: Mapping[str, Any], *, folder: Path, steps: int, wide: bool | None) -> Drilled:
    """Take the first steps of a config in several ways and compare loss and gradients.

    Args:
        cfg: A checked config.
        folder: An empty folder, where everything stays.
        steps: Optimizer steps; between two of them the weights move as Adam's first update would move them.
        wide: Also in float64; None where the model is small.

    Raises:
        ConfigError: A step holds one row only, so there is nothing to deal out.
        ChildFailed: One of two processes failed.
    """
    quiet_libraries()
    if cfg["optim"]["global_batch_size"] < 2:
        raise ConfigError("optim.global_batch_size=1: a step of one row cannot be dealt out. Pass 2 or more.")
    model = cfg["model"]
    place = resolve_model(model["path"], revision=model["revision"], trust_remote_code=model["trust_remote_code"])
    size = num_weights(place)
    if wide is None:
        wide = cfg["method"]["bits"] != 8 and size is not None and size <= SMALL
    elif wide and cfg["method"]["bits"] == 8:
        raise ConfigError("float64=true: 8-bit products round by themselves. Leave it out, or use method=qlora or lora.")
    drills = [_Drill(cfg, folder, steps, each) for each in ((True, False) if wide else (False,))]
    findings = [finding for drill in drills for finding in drill.run()]
    facts = {"weights": size, "steps": steps, "ways": [record for drill in drills for record in drill.records]}
    return Drilled("equivalence", folder, findings, facts | drills[-1].facts, drills[-1].lines())


class _Drill:
    """The drill in one precision."""

    def __init__(self, cfg: Mapping[str, Any], folder: Path, steps: int, wide: bool) -> None:
        self.cfg, self.steps, self.wide = cfg, steps, wide
        self.folder = folder / (FLOAT64 if wide else "own")
        self.facts: dict[str, Any] = {}
        self.records: list[dict[str, Any]] = []

    def run(self) -> Iterator[Finding]:
        """Take every step in every way."""
        self.folder.mkdir()
        with quietly():
            loaded = load(self.cfg, wide=self.wide)
        plan = loaded.taker.plan
        self.kind = FLOAT64 if self.wide else INT8 if self.cfg["method"]["bits"] == 8 else plan.precision
        self.facts = {"device": plan.describe(), "precision": plan.precision, "bits": self.cfg["method"]["bits"]}
        self.batch = loaded.step(0)
        compared: list[Compared] = []
        bases: list[Taken] = []
        skipped: dict[str, str] = {}
        for step in range(self.steps):
            base, found, left_out = self._step(loaded, step)
            compared += found
            skipped |= left_out
            tell(f"{self.group}: step {step + 1} taken in {len(found) + 1} ways")
            bases.append(base)
            move(loaded, base.gradients)
        on_gpu, settled = plan.device.type == "cuda", {**loaded.cfg}
        del loaded
        gc.collect()
        name = f"two processes ({'nccl' if on_gpu else 'gloo'})"
        if on_gpu and torch.cuda.device_count() < RANKS:
            skipped[name] = "there is one GPU, and each process needs one"
        else:
            if on_gpu:
                torch.cuda.empty_cache()
            tell(f"{self.group}: the same in {name}")
            results = take_in_two(settled, self.folder, steps=self.steps, wide=self.wide, on_gpu=on_gpu)
            compared += [
                Compared(name, step, *apart(base, result), False)
                for step, (base, result) in enumerate(zip(bases, results, strict=True))
            ]
        self.records = [
            {"precision": self.kind, "way": c.name, "step": c.step + 1, **c.gaps, "most_in": c.where} for c in compared
        ]
        yield from self._findings(compared, skipped)

    def _step(self, loaded: Loaded, step: int) -> tuple[Taken, list[Compared], dict[str, str]]:
        """Take one step in every way that this process can, the run's own first."""
        save_values(loaded, self.folder, step)
        loaded.taker.module.step = step
        batch = loaded.step(step)
        base = loaded.taker.take(batch, batch.micro_batches)
        found, skipped, runs = [], {}, loaded.execution
        with layers_run(loaded.network) as run:
            for way in _ways(batch, loaded.execution, pairs=self.cfg["data"]["batch"] == "pairs"):
                if way.execution is not None and way.execution != runs:
                    runs = way.execution
                    run(runs)
                taken = self._take(loaded, batch, way)
                if taken is None:
                    skipped[way.name] = "does not fit the device"
                    continue
                found.append(Compared(way.name, step, *apart(base, taken), way.is_control))
        return base, found, skipped

    def _take(self, loaded: Loaded, batch: StepBatch, way: Way) -> Taken | None:
        """Take a step in one way; None where memory runs out."""
        micros = way.deal(batch.micro_batches)
        try:
            if way.plain:
                return loaded.taker.take_plain(batch, micros)
            return loaded.taker.take(batch, micros, mean_of_means=way.mean_of_means)
        except torch.OutOfMemoryError:
            pass
        # Here the error is gone, and with it the tensors that its frames held.
        loaded.network.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
        return None

    def _findings(self, compared: Sequence[Compared], skipped: Mapping[str, str]) -> Iterator[Finding]:
        """Put the steps of each way together: of a control the step that shows it least, else the one that differs most."""
        bounds = BOUNDS[self.kind]
        clear = CLEAR.get(self.kind, CLEAR_IN_HALF)
        for name in sorted({one.name for one in compared}, key=[one.name for one in compared].index):
            those = [one for one in compared if one.name == name]
            control = those[0].is_control
            pick = min if control else max
            gaps = {key: pick(one.gaps[key] for one in those) for key in bounds}
            judged = pick(those, key=lambda one: one.gaps["gradients"])
            detail = f"step {judged.step + 1}: {judged.where}" if judged.where and not control else ""
            allowed = {key: clear * bound for key, bound in bounds.items()} if control else bounds
            yield Finding(name, gaps, dict(allowed), detail, is_control=control, group=self.group)
        for name, why in skipped.items():
            yield Finding(name, skipped=why, group=self.group)

    @property
    def group(self) -> str:
        """What is computed in, for people."""
        if self.wide:
            return FLOAT64
        return f"{self.kind}, base in {self.cfg['method']['bits']} bits"

    def lines(self) -> list[str]:
        """Say what was compared with what."""
        micros = len(self.batch.micro_batches)
        return [
            f"Everything is beside the step as the run takes it: {self.batch.num_samples} rows of {self.batch.num_tokens:,} tokens "
            f"in {micros} micro-batch{'es' if micros > 1 else ''}, dropout 0.",
            "loss / gradients: relative differences; of the gradients that of the tensor where it is largest, norm over norm.",
        ]


def _ways(batch: StepBatch, execution: Execution, *, pairs: bool) -> Iterator[Way]:
    """Name the ways that make sense for a step; those that change how layers run come last."""
    micros, rows = batch.micro_batches, batch.num_samples
    if len(micros) > 1:
        yield Way(f"one micro-batch of {rows} rows", whole)
    if len(micros) < rows:
        yield Way(f"{rows} micro-batches of one row", alone)
        yield Way("control: rows see those before them", leaking, is_control=True)
    yield Way("control: mean of two micro-batches' means", uneven, mean_of_means=True, is_control=True)
    plain = replace(execution, recompute="none", offload=False, compile=False)
    if plain != execution:
        yield Way("layers uncompiled, nothing computed again", alone, plain)
    if pairs:
        yield Way("pairs as two sequences, the prompt twice", as_two_sequences, plain)
    else:
        yield Way("rows alone in the model's own attention", alone, plain, plain=True)
    if execution.recompute != "full":
        yield Way("activations computed again", alone, replace(plain, recompute="full"))
