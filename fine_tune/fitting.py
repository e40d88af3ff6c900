"""The middle of a run: module, callbacks and trainer made from the config, and the figures they leave."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import nn

from fine_tune import assembly, checkpoints
from fine_tune.callbacks.checkpoint import AdapterCheckpoint
from fine_tune.callbacks.interrupt import Interrupt
from fine_tune.callbacks.metrics import MetricsWriter
from fine_tune.callbacks.reference_store import StoredReference
from fine_tune.callbacks.resume import Resume
from fine_tune.callbacks.throughput import Throughput
from fine_tune.callbacks.watch import Watch
from fine_tune.checklist.first_steps import FirstSteps, Reading
from fine_tune.checklist.item import Item
from fine_tune.data.module import PackedDataModule
from fine_tune.data.table import TokenTable
from fine_tune.device import DevicePlan
from fine_tune.evaluation.answers import Answerer
from fine_tune.evaluation.flops import FlopModel
from fine_tune.interrupts import StopSignals
from fine_tune.kept import Kept
from fine_tune.losses.sft import perplexity
from fine_tune.models.adapter import load_trained_state, trainable
from fine_tune.modules.reference import FrozenAdapter
from fine_tune.modules.step import StepModule
from fine_tune.reference_store import ReferenceStore
from fine_tune.run_folder import versions
from fine_tune.speed import chosen_execution
from fine_tune.targets import build
from fine_tune.tracking.run_trackers import RunTrackers
from fine_tune.watching import Watcher

# Keys of ``objective`` that are for the config, or that the run turns into something else first.
NOT_THE_MODULES = ("_target_", "name", "accepts", "default_lr", "reference", "reference_store")
# Where Linux names the processor.
CPU_INFO = Path("/proc/cpuinfo")


@dataclass
class Job:
    """A run in progress: its config, its folder, its device, and where it goes on from."""

    cfg: Mapping[str, Any]
    path: Path
    plan: DevicePlan
    checkpoint: checkpoints.Checkpoint | None
    signals: StopSignals
    started: float = field(default_factory=time.perf_counter)
    trackers: RunTrackers = field(default_factory=RunTrackers)
    kept: Kept | None = None
    watcher: Watcher = field(default_factory=Watcher)

    # What the checklist has seen before the layers were compiled.
    proved: list[Item] = field(default_factory=list)
    # Nothing is left to train: the last step is done, or an early stop ended the run.
    finished: bool = False

    @property
    def first_step(self) -> int:
        """Optimizer steps already done."""
        return 0 if self.checkpoint is None else self.checkpoint.step


@dataclass
class Fitted:
    """A trained module and what was counted on the way."""

    module: StepModule
    metrics: MetricsWriter
    throughput: Throughput
    adapter_step: int

    def summary(self, job: Job, num_train_samples: int) -> dict[str, Any]:
        """Return the run's figures; losses are means over supervised tokens (SFT) or pairs (DPO), not over steps."""
        losses, cfg = self.metrics.train_losses, job.cfg
        counted = sum(count for _, count in losses)
        found = self.metrics.val_metrics.get(self.adapter_step, {})
        final = found.get("val/loss")
        return {
            "run_name": job.path.name,
            "objective": cfg["objective"]["name"],
            "method": cfg["method"]["name"],
            "model": cfg["model"]["name"],
            "epochs": self.throughput.totals["samples"] / max(1, num_train_samples),
            "steps": self.module.step,
            **self.throughput.summary(job.plan.device, job.plan.num_ranks),
            "train_loss": math.fsum(loss * count for loss, count in losses) / counted if counted else None,
            "final_loss": final,
            "loss_unit": self.module.loss_unit,
            "final_perplexity": None if final is None or not self.module.has_perplexity else perplexity(final),
            "preference_accuracy": found.get("val/rewards/accuracies"),
            "reward_margin": found.get("val/rewards/margins"),
            "kl": found.get("val/kl"),
            "grad_norm": self.metrics.grad_norms[-1] if self.metrics.grad_norms else None,
            "trainable_parameters": sum(p.numel() for p in trainable(self.module.network).values()),
            "total_parameters": FlopModel.parameters(self.module.network),
            "skipped_steps": self.module.skipped_steps,
            "micro_batch_halvings": self.module.replay.num_halvings,
            "device": job.plan.describe(),
            "precision": job.plan.precision,
        }


def fit(
    job: Job,
    network: nn.Module,
    data: PackedDataModule,
    *,
    answerer: Answerer,
    record: Mapping[str, Any],
    reference: FrozenAdapter | None = None,
) -> Fitted:
    """Train to the last planned step; ``record`` goes into every checkpoint's manifest."""
    module = build_module(job.cfg, network, data, reference)
    module.step = job.first_step
    module.answerer = answerer
    chosen = assembly.chosen_callbacks(job.cfg)
    throughput = next((c for c in chosen.values() if isinstance(c, Throughput)), None) or Throughput()
    metrics = MetricsWriter(
        job.path / "metrics.jsonl", first_step=job.first_step, loss_counts=module.loss_counts
    )
    savers = [c for c in chosen.values() if isinstance(c, AdapterCheckpoint)]
    for saver in savers:
        saver.record = dict(record)
    others = [c for c in chosen.values() if c is not throughput and c not in savers]
    others += _checklist(job, answerer)
    resume: list[pl.Callback] = [Resume(job.checkpoint)] if job.checkpoint is not None else []
    stored = _stored_reference(job, data, record)
    # Order matters: counts first, then what uses them, then the checkpoint, and leaving last.
    leaving = [Watch(job.watcher, metrics), Interrupt(job.signals, str(job.path))]
    callbacks = [*stored, *resume, throughput, metrics, *others, *savers, *leaving]
    trainer = assembly.make_trainer(
        job.cfg["trainer"],
        job.plan,
        folder=job.path,
        callbacks=callbacks,
        loggers=list(job.trackers.loggers),
        steps=(job.first_step, data.num_steps),
    )
    if job.finished:
        _restore_counts(job, module, throughput)
    else:
        with _start_shared(job, module, metrics, record):
            trainer.fit(module, datamodule=data)
    step = next(
        (_take_best(saver, module, job.path / "checkpoints") for saver in savers if job.plan.rank == 0), module.step
    )
    return Fitted(module, metrics, throughput, step)


def _checklist(job: Job, answerer: Answerer) -> list[pl.Callback]:
    if not job.cfg["trainer"]["checklist"]:
        return []
    reading = Reading(answerer.tokenizer, answerer.template)
    return [FirstSteps(job.path, reading, before=job.proved, batch_kind=job.cfg["data"]["batch"])]


@contextmanager
def _start_shared(job: Job, module: StepModule, metrics: MetricsWriter, record: Mapping[str, Any]) -> Iterator[None]:
    """Validate a fresh adapter once for all runs that share a base: it adds zeros, whatever its rank and scale."""
    cfg, kept = job.cfg, job.kept
    fresh = job.first_step == 0 and cfg["init_from"] is None and not cfg["method"]["use_dora"] and module.has_perplexity
    if kept is None or not fresh or not assembly.is_shared(cfg):
        yield
        return
    rows = [record[key] for key in ("data_fingerprint", "template_hash", "tokenizer_fingerprint")]
    ways = [cfg["trainer"]["micro_batch_tokens"], cfg["objective"]["head_chunk_tokens"], cfg["method"]["target_modules"]]
    key = repr((kept.key, rows, ways, chosen_execution(cfg["trainer"])))
    module.known_start = kept.starts.get(key)
    yield
    if (found := metrics.val_metrics.get(0)) is not None:
        kept.starts[key] = {name.removeprefix("val/"): value for name, value in found.items()}


def build_module(
    cfg: Mapping[str, Any], network: nn.Module, data: PackedDataModule, reference: FrozenAdapter | None
) -> StepModule:
    """Build the objective's module over a network and planned data."""
    trainer, objective = cfg["trainer"], cfg["objective"]
    settings = {key: value for key, value in objective.items() if key not in NOT_THE_MODULES}
    if reference is not None:
        settings |= {"reference": reference, "reference_name": objective["reference"]}
    module: StepModule = build(
        {"_target_": objective["_target_"]},
        network=network,
        optim=assembly.optim_spec(cfg["optim"]),
        num_steps=data.num_steps,
        max_skipped_steps=trainer["max_skipped_steps"],
        val_every_n_steps=trainer["val_every_n_steps"] if len(data.prepared.val) else 0,
        **settings,
    )
    return module


def _stored_reference(job: Job, data: PackedDataModule, record: Mapping[str, Any]) -> list[pl.Callback]:
    """Make the callback that keeps reference values on disk, where the objective names a place for them."""
    place = job.cfg["objective"].get("reference_store")
    if place is None or job.finished:
        return []
    key = reference_key(job, record, data)
    return [StoredReference(ReferenceStore(Path(place).expanduser(), key, num_rows=len(data.prepared.train)))]


def reference_key(job: Job, record: Mapping[str, Any], data: PackedDataModule) -> dict[str, Any]:
    """Name everything that decides a reference log-probability, down to the kernels' versions and the device."""
    cfg = job.cfg
    method = ("bits", "quant_type", "double_quant", "trains", "use_dora", "target_modules")
    return {
        **record,
        "method": {key: cfg["method"][key] for key in method},
        "model": {key: cfg["model"][key] for key in ("dtype", "add_tokens")},
        "data": {key: cfg["data"][key] for key in ("max_seq_len", "overflow")},
        "plan": [cfg["seed"], cfg["optim"]["global_batch_size"], cfg["trainer"]["micro_batch_tokens"], job.plan.num_ranks],
        "head_chunk_tokens": cfg["objective"]["head_chunk_tokens"],
        "precision": [job.plan.precision, str(job.plan.compute_dtype), asdict(chosen_execution(cfg["trainer"]))],
        "device": [job.plan.describe(), _cpu_name() if job.plan.device.type == "cpu" else None],
        "rows": _hash_rows(data.prepared.train),
        "versions": versions(),
    }


def _hash_rows(table: TokenTable) -> str:
    """Hash names, tokens, masks and branches of all rows in their order."""
    digest = hashlib.sha256(json.dumps(table.row_ids).encode())
    for array in (table.offsets, table.ids, table.loss_mask):
        digest.update(array.tobytes())
    for row in range(len(table)):
        digest.update(f"{table.branches(row)}".encode())
    return digest.hexdigest()


def _cpu_name() -> str:
    """Name the processor's model: its vector units decide how sums are rounded."""
    with suppress(OSError):
        for line in CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _restore_counts(job: Job, module: StepModule, throughput: Throughput) -> None:
    """Take the figures of a run that has no step left from its last checkpoint."""
    assert job.checkpoint is not None
    state = job.checkpoint.trainer_state()
    module.skipped_steps = state["skipped_steps"]
    throughput.load_state_dict(state["callbacks"][throughput.state_key])


def _take_best(saver: AdapterCheckpoint, module: StepModule, root: Path) -> int:
    """Put the best checkpoint's weights back, when the config asks for them; return the step the weights are of."""
    if not saver.use_best or saver.best is None or saver.best[1] == module.step:
        return module.step
    best = checkpoints.verify(root / f"step-{saver.best[1]:07d}")
    load_trained_state(module.network, best.adapter(), origin=str(best.folder))
    return best.step
