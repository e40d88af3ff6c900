"""Merge a checkpoint into its base: written shard by shard, read back in a fresh process, compared, and only then kept."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from fine_tune import assembly, safe_load
from fine_tune.device import DTYPES, DevicePlan, plan_device
from fine_tune.errors import CheckpointError, RunLocked
from fine_tune.merging import files
from fine_tune.merging.proof import Proof, prove
from fine_tune.merging.resources import check_disk, forget_peak, peak_rss
from fine_tune.merging.settings import Choice, MergeSettings, choose
from fine_tune.merging.skeleton import skeleton
from fine_tune.merging.source import Source
from fine_tune.merging.trained import Trained, read_trained
from fine_tune.merging.weights import Casts, Weights, total_bytes
from fine_tune.merging.writer import write_shards
from fine_tune.models.adapter import check_adapter
from fine_tune.models.fingerprint import base_fingerprint
from fine_tune.models.hub import resolve_model
from fine_tune.passport.document import FILE, document, stops
from fine_tune.quiet import quiet_libraries
from fine_tune.rng import untouched_rng
from fine_tune.run_folder import versions
from fine_tune.storage import TEMP_PREFIX, new_folder, sha256, write_json
from fine_tune.subjects import Named, find, spec_of

REPORT = "merge_report.json"


def merge(cfg: Mapping[str, Any], settings: MergeSettings) -> dict[str, Any]:
    """Merge the checkpoint that a checked config names, and return the report.

    Raises:
        FineTuneError: Whatever stops it, with the exit code for it; nothing is left at ``out`` then.
    """
    quiet_libraries()
    started = time.perf_counter()
    plan = plan_device(accelerator=cfg["accelerator"], devices=1, num_nodes=1, precision="32-true")
    named = find([cfg["ckpt"]], cfg)[0]
    folder = _folder_of(named)
    choice = choose(named, settings, safe_load.json_object(folder / "config.json"))
    with untouched_rng(), _alone(choice.out):
        job = _Job(named, choice, plan, folder)
        check_disk(choice.out, total_bytes(job.weights.slots()))
        with new_folder(choice.out) as place:
            job.write(place, settings.shard_gb * 1e9)
            proof = job.prove(place, settings.tolerance)
            report = {**job.report(), **proof.report(), "seconds": time.perf_counter() - started}
            beside = choice.out.with_name(f"{choice.out.name}.{REPORT}")
            if proof.problem is not None:
                write_json(beside, report)
                raise CheckpointError(f"{choice.out}: {proof.problem} Nothing was kept; {beside} has the figures.")
            write_json(place / REPORT, report)
            job.write_passport(place, proof)
        # Of an earlier attempt that was refused.
        beside.unlink(missing_ok=True)
    return {**report, "folder": str(choice.out)}


def _folder_of(named: Named) -> Path:
    model = named.cfg["model"]
    return resolve_model(model["path"], revision=model["revision"], trust_remote_code=model["trust_remote_code"])


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep a second merge out of the same place, and delete what a killed one left beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(out.with_name(f".{out.name}.lock")))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunLocked(f"{out} is being written by another process. Wait for it, or pass another out=.") from error
    try:
        for leftover in out.parent.glob(f"{TEMP_PREFIX}*-{out.name}"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


class _Job:
    """One merge: its parts, and what was measured on the way."""

    def __init__(self, named: Named, choice: Choice, plan: DevicePlan, folder: Path) -> None:
        model = named.cfg["model"]
        self.named, self.choice, self.plan, self.folder = named, choice, plan, folder
        self.tokenizer, self.template = assembly.load_text(model, folder)
        self.fingerprint = base_fingerprint(folder)
        self.note = None
        if named.weights is not None:
            self.note = check_adapter(named.weights.parent, self.fingerprint, key="ckpt")
        method = {**named.cfg["method"], **({"bits": 16} if choice.is_original or named.whole else {})}
        loaded = self._loaded_dtype()
        self.weights = Weights(
            Source(folder),
            skeleton(folder, method, trust_remote_code=model["trust_remote_code"]),
            self._trained(),
            Casts(loaded, choice.dtype, plan.device),
            len(self.tokenizer),
        )
        self.measured: dict[str, Any] = {}

    def _loaded_dtype(self) -> torch.dtype:
        if self.named.whole or self.named.cfg["method"]["trains"] == "all":
            return torch.float32
        return DTYPES[self.named.cfg["model"]["dtype"]]

    def _trained(self) -> Trained:
        if self.named.weights is None:
            return Trained()
        state = safe_load.tensors(self.named.weights)
        return read_trained(state, spec_of(self.named, self.tokenizer), origin=f"ckpt={self.named.label}")

    def write(self, place: Path, shard_bytes: float) -> None:
        """Write the whole folder."""
        forget_peak()
        started = time.perf_counter()
        slots = self.weights.slots()
        write_shards(place, slots, self.weights.make, shard_bytes=shard_bytes)
        self.measured = {
            "merge_seconds": time.perf_counter() - started,
            "peak_rss_gb": _gb(peak_rss()),
            "written_gb": _gb(total_bytes(slots)),
        }
        files.write_config(
            place, self.folder, rows=self.weights.vocabulary, tied=self.weights.tied, dtype=self.choice.dtype,
            pad_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        files.write_generation(place, self.tokenizer, stops(self.tokenizer, self.template))
        code = self.named.cfg["model"]["trust_remote_code"]
        files.write_text(place, self.folder, self.tokenizer, self.template, code=code)

    def prove(self, place: Path, tolerance: float | None) -> Proof:
        """Read the folder back and compare it."""
        forget_peak()
        started = time.perf_counter()
        proof = prove(place, self.named, self.choice, self.plan, tolerance=tolerance)
        self.measured |= {"check_seconds": time.perf_counter() - started, "check_peak_rss_gb": _gb(peak_rss())}
        return proof

    def report(self) -> dict[str, Any]:
        """Say what was merged into what, and what it cost."""
        model, weights = self.named.cfg["model"], self.named.weights
        return {
            "checkpoint": self.named.label,
            "adapter_sha256": None if weights is None else sha256(weights),
            "model": Path(model["path"]).name if Path(model["path"]).is_dir() else model["path"],
            "revision": model["revision"],
            "base_fingerprint": self.fingerprint,
            "base": self.choice.base,
            "trained_on": self.choice.trained_on,
            "dtype": str(self.choice.dtype).removeprefix("torch."),
            "tied_embeddings": self.weights.tied,
            "device": self.plan.describe(),
            "versions": versions(),
            "note": self.note,
            **self.measured,
        }

    def write_passport(self, place: Path, proof: Proof) -> None:
        """Write what the reloaded folder said."""
        found = document(
            proof.own.asked,
            proof.reloaded.said,
            tokenizer=self.tokenizer,
            template=self.template,
            left_out=proof.own.left_out,
        )
        origin = {"base_fingerprint": self.fingerprint, "merged_into": self.choice.base}
        precision = str(proof.reloaded.dtype).removeprefix("torch.")
        write_json(place / FILE, {**found, "precision": precision, "origin": origin})


def _gb(num_bytes: int | None) -> float | None:
    return None if num_bytes is None else round(num_bytes / 1e9, 4)
