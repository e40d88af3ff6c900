"""More protections taken out on purpose: of what a run reads, of servers, of evaluations and of preference runs."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from benchmarks.faults.broken import nothing, replace, replace_method, variant


@variant
def any_config() -> None:
    """A saved config is not checked."""
    replace("fine_tune.config", "check_resolved", lambda old: lambda cfg: [])


@variant
def rows_dropped() -> None:
    """Rows that cannot be read are left out without a word."""

    def forgiving(old: Any) -> Any:
        def read_local(path: str) -> list[Any]:
            from fine_tune.data.readers import _file_rows, local_files

            return [row for file in local_files(path) for row in _file_rows(file, nothing)]

        return read_local

    replace("fine_tune.data.readers", "read_local", forgiving)


@variant
def changes_accepted() -> None:
    """A run goes on on other data, another tokenizer or another base."""
    rows_dropped()
    replace("fine_tune.starting", "refuse_changes", lambda old: nothing)


@variant
def any_base() -> None:
    """Nobody asks which base an adapter belongs to."""
    replace("fine_tune.models.adapter_source", "check_base", lambda old: nothing)


@variant
def unguarded() -> None:
    """Losses, gradients and weights may be anything."""
    import torch

    def unchecked(old: Any) -> Any:
        def on_before_optimizer_step(self: Any, optimizer: Any) -> None:
            from fine_tune.modules.optim import clip_grad_norm

            norm = clip_grad_norm(self._trained, self.optim.max_grad_norm).double().reshape(1)
            self._done.found = torch.cat([self._done.sums[:1], norm, self._done.sums[1:]]).tolist()

        return on_before_optimizer_step

    replace("fine_tune.models.adapter_source", "_check_weights", lambda old: nothing)
    torch.isfinite = lambda tensor: torch.ones_like(tensor, dtype=torch.bool)  # type: ignore[assignment]
    replace_method("fine_tune.modules.step", "StepModule", "on_before_optimizer_step", unchecked)


@variant
def cache_believed() -> None:
    """Prepared data is taken as it lies there."""
    replace(
        "fine_tune.data.cache", "find", lambda old: lambda root, key: (root / key) if (root / key).is_dir() else None
    )


@variant
def tracker_inside() -> None:
    """A tracker is spoken to by the thread that trains, and its errors are the run's."""

    def direct(old: Any) -> Any:
        def put(self: Any, action: Any) -> None:
            if action is not None:
                action()

        return put

    def only_online(old: Any) -> Any:
        def start(self: Any, context: Any) -> None:
            self._run, self._full = context, False
            self._open(context)

        return start

    replace_method("fine_tune.tracking.mailbox", "Mailbox", "_put", direct)
    replace_method("fine_tune.tracking.wandb_tracker", "WandbTracker", "start", only_online)


@variant
def any_device() -> None:
    """A GPU that is not there is replaced by the CPU without a word."""

    def replaced(old: Any) -> Any:
        def plan_device(**asked: Any) -> Any:
            return old(**{**asked, "accelerator": "cpu"})

        return plan_device

    replace("fine_tune.device", "plan_device", replaced)


@variant
def secrets_taken() -> None:
    """Nobody looks for secrets."""
    replace("fine_tune.redaction", "is_secret", lambda old: lambda value, key="": False)
    replace("fine_tune.redaction", "secret_in_override", lambda old: lambda override: False)
    replace("fine_tune.redaction", "masked", lambda old: lambda text: text)
    replace("fine_tune.redaction", "redact", lambda old: lambda tree, key="": tree)


@variant
def order_by_hash() -> None:
    """The order of samples hangs on Python's own hashes."""
    import numpy as np

    def hashed(old: Any) -> Any:
        def order(self: Any, epoch: int) -> Any:
            if "PYTHONHASHSEED" not in os.environ:
                return old(self, epoch)
            seed = [self.seed, hash("order") % 997, epoch]
            return np.random.Generator(np.random.PCG64(seed)).permutation(len(self.lengths))

        return order

    replace_method("fine_tune.packing.plan", "Planner", "order", hashed)


@variant
def answers_forgotten() -> None:
    """What an evaluation had answered is thrown away."""

    def forgetting(old: Any) -> Any:
        def start(self: Any, chunks: Any) -> Any:
            (self.folder / "partial.jsonl").unlink(missing_ok=True)
            (self.folder / "partial.jsonl").touch()
            return old(self, chunks)

        return start

    replace_method("fine_tune.evaluation.record", "Record", "start", forgetting)


@variant
def strict_answers() -> None:
    """A line of answers that was cut off by a kill is read like any other."""

    def strict(old: Any) -> Any:
        def start(self: Any, chunks: Any) -> Any:
            file = self.folder / "partial.jsonl"
            for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
                json.loads(text)
            return old(self, chunks)

        return start

    replace_method("fine_tune.evaluation.record", "Record", "start", strict)


@variant
def any_answers() -> None:
    """A finished evaluation is taken for whole."""

    def believing(old: Any) -> Any:
        def finished(self: Any) -> Any:
            from fine_tune.evaluation.record import Result

            if not (self.folder / "metrics.json").is_file():
                return None
            report = json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))
            whole = (self.folder / "items.jsonl").read_text(encoding="utf-8").splitlines()[:-1]
            return Result(report["checkpoint"], self.folder, [json.loads(line) for line in whole], report["metrics"])

        return finished

    replace_method("fine_tune.evaluation.record", "Record", "finished", believing)


@variant
def fresh_reference() -> None:
    """A preference run that goes on measures itself against a fresh adapter."""

    def fresh(old: Any) -> Any:
        def reference(cfg: Any, network: Any, *args: Any, resumed: bool, **kwargs: Any) -> Any:
            from fine_tune.modules.reference import snapshot

            return snapshot(network) if resumed else old(cfg, network, *args, resumed=resumed, **kwargs)

        return reference

    replace("fine_tune.starting", "_reference", fresh)
    replace("fine_tune.starting", "refuse_changes", lambda old: nothing)


@variant
def patient() -> None:
    """A hub that does not answer is asked again for half a minute."""
    import huggingface_hub
    from huggingface_hub import errors

    download = huggingface_hub.snapshot_download

    def insisting(*args: Any, **kwargs: Any) -> Any:
        try:
            return download(*args, **kwargs)
        except (OSError, errors.HTTPError):
            time.sleep(30)
            return download(*args, **kwargs)

    huggingface_hub.snapshot_download = insisting
