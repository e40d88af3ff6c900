"""One run from a checked config to its folder: data, model, proof, training, held-out answers, summary."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich
import torch
from rich.text import Text
from torch import nn

from fine_tune import assembly, summary
from fine_tune.callbacks.progress import progress_bar
from fine_tune.data.module import PackedDataModule
from fine_tune.data.prepare import Prepared
from fine_tune.device import DEVICE_KEYS, DevicePlan, plan_device
from fine_tune.errors import ConfigError, MemoryExhausted
from fine_tune.evaluation.answers import Answerer
from fine_tune.evaluation.held_out import HeldOut, evaluate_held_out, read_held_out, write_held_out
from fine_tune.fitting import Job, fit
from fine_tune.interrupts import StopSignals
from fine_tune.kept import Kept
from fine_tune.memory_plan import plan_memory
from fine_tune.models.adapter import scaling
from fine_tune.models.execution import prepare_layers
from fine_tune.models.export import export_adapter
from fine_tune.models.fingerprint import base_fingerprint
from fine_tune.models.forward import prove_forward, prove_shared_prefix
from fine_tune.models.hub import context_length, resolve_model
from fine_tune.opening import adapter_hashes, finished_in_sweep, nothing_left, opened, say
from fine_tune.passport.document import write_passport
from fine_tune.quiet import quiet_libraries
from fine_tune.report.visible import visible
from fine_tune.run_folder import clear_folder, config_hash, failure_told, write_config, write_manifest
from fine_tune.speed import chosen_execution
from fine_tune.starting import check_sources, start
from fine_tune.storage import storage_errors, write_json
from fine_tune.text.template import AUTO, ChatTemplate
from fine_tune.text.tokenizer import tokenizer_fingerprint
from fine_tune.training_data import plan_steps, prepared_data, samples_of
from fine_tune.watching import Watcher


@dataclass
class RunResult:
    """What a run leaves to its caller."""

    summary: dict[str, Any]
    run_dir: str


def run(
    cfg: Mapping[str, Any], *, overrides: list[str] | None = None, kept: Kept | None = None, watcher: Watcher | None = None
) -> RunResult:
    """Do one training run.

    Args:
        cfg: A config that ``check_config`` accepted, as plain containers.
        overrides: The words it was made from, for the manifest.
        kept: What runs of this process share; None loads everything anew and keeps nothing.
        watcher: Who follows the run.

    Raises:
        FineTuneError: Whatever stops the run, with the exit code for it.
    """
    started = time.perf_counter()
    quiet_libraries()
    trainer = cfg["trainer"]
    plan = plan_device(**{key: trainer[key] for key in DEVICE_KEYS})
    rich.get_console().quiet = plan.rank > 0
    watcher = watcher or Watcher()
    with StopSignals() as signals, opened(cfg, plan) as (path, checkpoint), failure_told(path), _memory_told(plan):
        watcher.opened(path)
        if earlier := finished_in_sweep(cfg, path):
            return RunResult(earlier, str(path))
        _free_earlier(plan)
        job = Job(cfg, path, plan, checkpoint, signals, started, kept=kept, watcher=watcher)
        with job.trackers:
            return _train(job, overrides or [])


def _free_earlier(plan: DevicePlan) -> None:
    """Give back what an earlier run of this process, such as a sweep's, has left on the device."""
    if plan.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def _memory_told(plan: DevicePlan) -> Iterator[None]:
    """Turn an out-of-memory error into what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        peak = torch.cuda.max_memory_allocated(plan.device) / 1e9
        raise MemoryExhausted(
            f"{plan.describe()} ran out of memory at a peak of {peak:.2f} GB. Lower trainer.micro_batch_tokens (same result), "
            "set trainer.speed=lean (same result), lower data.max_seq_len, or use method=qlora."
        ) from error


def _train(job: Job, overrides: list[str]) -> RunResult:
    cfg, path, model = job.cfg, job.path, job.cfg["model"]
    model_folder = resolve_model(
        model["path"], revision=model["revision"], trust_remote_code=model["trust_remote_code"]
    )
    _refuse_long(cfg["data"]["max_seq_len"], model_folder)
    identity = base_fingerprint(model_folder)
    tokenizer, template = assembly.load_text(model, model_folder)
    if job.checkpoint is None:
        check_sources(cfg, identity, template_hash=template.sha256)
    if model["chat_template"] == AUTO and not model["path"].startswith("builtin:"):
        say(f"note: model.chat_template=auto takes {template.name} for this tokenizer; set it to train another form.")
    data = _data(job, model_folder, tokenizer, template)
    cfg = job.cfg
    done = None if job.checkpoint is None else job.first_step
    job.finished = nothing_left(cfg, path, done=done, num_steps=data.num_steps)
    if cfg["overwrite"] and not cfg["resume"]:
        clear_folder(path)
    write_config(path, cfg)
    write_json(path / "data_ledger.json", data.prepared.ledger.as_dict())
    record: dict[str, Any] = {
        "base_fingerprint": identity,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "chat_template": template.name,
        "template_hash": template.sha256,
        "data_fingerprint": data.prepared.fingerprint,
    }
    known = {"config_hash": config_hash(cfg), **record, **(adapter_hashes(cfg) if job.checkpoint is None else {})}
    write_manifest(path, seed=cfg["seed"], device=job.plan.describe(), fingerprints=known, overrides=overrides)
    job.trackers.open(cfg, path, first_step=job.first_step, rank=job.plan.rank)
    execution = chosen_execution(cfg["trainer"])
    with rich.get_console().status(Text(visible(f"loading {model['path']}"))):
        network = assembly.load_network(
            cfg, model_folder, tokenizer, job.plan, dense_base=execution.dense_base, kept=job.kept, identity=identity
        )
    record["scaling"] = scaling(network)
    with torch.autocast(job.plan.device.type, job.plan.compute_dtype, enabled=job.plan.precision != "32-true"):
        proof: dict[str, Any] = {"device": job.plan.device, "vocabulary": min(len(tokenizer), 4096)}
        prove_forward(network, **proof)
        if cfg["data"]["batch"] == "pairs":
            prove_shared_prefix(network, **proof)
    reference = start(cfg, network, record, folder=path, checkpoint=job.checkpoint)
    prepare_layers(network, execution)
    answerer = _answerer(job, network, tokenizer, template)
    answers = {"base": _held_out(job, answerer, data.prepared, who="base")}
    if cfg["init_from"]:
        answers["initial"] = _held_out(job, answerer, data.prepared, who="initial")
    fitted = fit(job, network, data, answerer=answerer, record=record, reference=reference)
    answers["final"] = _held_out(job, answerer, data.prepared, who="final")
    origin = {**record, "model": model["path"], "revision": model["revision"], "step": fitted.adapter_step}
    _export(job, network, tokenizer, template, origin=origin)
    values = fitted.summary(job, len(data.prepared.train)) | _answers(answers)
    result = summary.complete(values | {"wall_seconds": time.perf_counter() - job.started})
    write_json(path / "summary.json", result)
    job.trackers.finish(result, adapter=path / "adapter", step=fitted.adapter_step)
    summary.show(result, str(path))
    return RunResult(result, str(path))


def _export(
    job: Job, network: nn.Module, tokenizer: Any, template: ChatTemplate, *, origin: Mapping[str, Any]
) -> None:
    """Write the adapter with its passport: what it must say again wherever it is served."""
    folder, text = job.path / "adapter", {"tokenizer": tokenizer, "template": template}
    known = {key: origin[key] for key in ("base_fingerprint", "step")}
    with storage_errors(folder):
        export_adapter(network, folder, identity=dict(origin), **text)
        write_passport(folder, network, **text, origin=known, precision=job.plan.compute_dtype)


def _refuse_long(max_seq_len: int, folder: Path) -> None:
    positions = context_length(folder)
    if positions is not None and max_seq_len > positions:
        raise ConfigError(
            f"data.max_seq_len={max_seq_len}: the model was made for {positions} tokens. Lower it to that or less."
        )


def _answerer(job: Job, network: nn.Module, tokenizer: Any, template: ChatTemplate) -> Answerer:
    """Answer with prompts that leave room for the answer in the model's context."""
    context: int = getattr(network.config, "max_position_embeddings", 2048)
    room = max(1, context - job.cfg["data"]["max_new_tokens"])
    answerer = Answerer(network, tokenizer, template, max_prompt_tokens=room, precision=job.plan.compute_dtype)
    if job.kept is not None and assembly.is_shared(job.cfg):
        # The base says the same in every run that asks it the same way.
        answerer.of_base = job.kept.answers
        answerer.base_key = repr(
            (job.kept.key, template.sha256, chosen_execution(job.cfg["trainer"]), job.cfg["method"]["target_modules"])
        )
    return answerer


def _data(job: Job, model_folder: Path, tokenizer: Any, template: ChatTemplate) -> PackedDataModule:
    """Prepare the rows, show what was lost on the way, settle what is left to the device's memory, and plan the steps."""
    data = prepared_data(job.cfg, tokenizer, template)
    rich.get_console().print(data.prepared.ledger.render())
    for line in data.prepared.warnings:
        say(f"note: {line}")
    # A base that is kept is used again, or freed before another is loaded: its room is this run's.
    held = job.kept.device_bytes if job.kept else 0
    found = plan_memory(job.cfg, job.plan, model_folder, samples_of(job.cfg, data, num_ranks=job.plan.num_ranks), held=held)
    for line in found.describe():
        say(line)
    # The run goes on with what was chosen.
    job.cfg = {**job.cfg, "trainer": found.settled(job.cfg["trainer"])}
    plan_steps(job.cfg, data, num_ranks=job.plan.num_ranks)
    data.first_step = job.first_step
    return data


def _held_out(job: Job, answerer: Answerer, prepared: Prepared, *, who: str) -> HeldOut | None:
    """Answer the held-out questions as the base, the initial adapter or the final one.

    What was answered before training is taken once per run, and read back when the run is resumed.
    """
    settings = job.cfg["data"]
    items = prepared.eval_items[: settings["num_eval_items"]]
    if not items:
        return None
    folder = job.path / "eval" / ("held_out" if who == "final" else f"held_out_{who}")
    if who != "final" and job.checkpoint is not None:
        if (folder / "metrics.json").is_file():
            return read_held_out(folder)
        if who == "initial":
            return None  # the network is at the checkpoint by now
    started = time.perf_counter()
    rule = settings["answer_rule"]
    with progress_bar() as bar:
        task = bar.add_task(f"{who} answers", total=len(items), note="")
        result = evaluate_held_out(
            answerer,
            items,
            rule=rule,
            max_new_tokens=settings["max_new_tokens"],
            base=who == "base" and answerer.has_adapter(),
            progress=lambda count: bar.advance(task, count),
        )
    write_held_out(folder, result, items, rule=rule, checkpoint=who, started=started)
    return result


def _answers(answers: Mapping[str, HeldOut | None]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for who, prefix in (("base", "base_"), ("initial", "initial_"), ("final", "")):
        result = answers.get(who)
        found[f"{prefix}exact_match"] = result.exact_match if result else None
        found[f"{prefix}mean_completion_tokens"] = result.mean_completion_tokens if result else None
    return found
