"""One run from a checked config to its folder: data, model, proof, training, held-out answers, summary."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import rich
import torch
from rich.text import Text
from torch import nn

from fine_tune import assembly, summary
from fine_tune.callbacks.progress import progress_bar
from fine_tune.checklist.passes import adapter_item, probe
from fine_tune.data.module import dead_workers_told
from fine_tune.data.prepare import Prepared
from fine_tune.device import DEVICE_KEYS, DevicePlan, place_in_group, plan_device
from fine_tune.errors import MemoryExhausted
from fine_tune.evaluation.answers import Answerer
from fine_tune.evaluation.held_out import HeldOut, evaluate_held_out, read_held_out, write_held_out
from fine_tune.fitting import Job, fit
from fine_tune.interrupts import StopSignals
from fine_tune.kept import Kept
from fine_tune.memory_plan import plan_memory
from fine_tune.models.adapter import scaling
from fine_tune.models.execution import prepare_layers
from fine_tune.models.export import export_adapter
from fine_tune.models.forward import prove_forward, prove_shared_prefix
from fine_tune.opening import adapter_hashes, finished_in_sweep, nothing_left, opened, say
from fine_tune.passport.document import write_passport
from fine_tune.preflight.findings import Findings
from fine_tune.preflight.inputs import Inputs, open_inputs
from fine_tune.preflight.machine import check_disk, check_packages, check_places
from fine_tune.quiet import quiet_libraries
from fine_tune.report.visible import visible
from fine_tune.run_folder import SUMMARY, clear_folder, config_hash, failure_told, write_config, write_manifest
from fine_tune.speed import chosen_execution
from fine_tune.starting import start
from fine_tune.storage import storage_errors, write_json
from fine_tune.text.template import AUTO, ChatTemplate
from fine_tune.training_data import plan_steps, samples_of
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
    rank = place_in_group().rank
    rich.get_console().quiet = rank > 0
    watcher, findings, plan = watcher or Watcher(), Findings(), None
    with findings.of("device"):
        plan = plan_device(**{key: trainer[key] for key in DEVICE_KEYS})
    with findings.of("packages"):
        check_packages(cfg)
    with findings.of("places"):
        check_places(cfg)
    with StopSignals() as signals, ExitStack() as held:
        path = checkpoint = None
        with findings.of("run folder"):
            path, checkpoint = held.enter_context(opened(cfg, rank=rank))
            held.enter_context(failure_told(path))
            watcher.opened(path)
        if path is not None and (earlier := finished_in_sweep(cfg, path)):
            return RunResult(earlier, str(path))
        inputs = open_inputs(cfg, findings, checkpoint=checkpoint)
        if inputs is not None and path is not None:
            with findings.of("disk"):
                check_disk(cfg, inputs.folder, path)
        findings.refuse()
        assert plan is not None
        assert path is not None
        assert inputs is not None
        say(f"checked before loading: {', '.join(findings.looked_at)}")
        _free_earlier(plan)
        held.enter_context(_memory_told(plan))
        held.enter_context(dead_workers_told(trainer["num_workers"]))
        job = Job(cfg, path, plan, checkpoint, signals, started, kept=kept, watcher=watcher)
        with job.trackers:
            return _train(job, inputs, overrides or [])


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
    except (MemoryError, RuntimeError) as error:
        # What torch's allocator says of main memory has no class of its own.
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        raise MemoryExhausted(
            "main memory is used up. Lower trainer.micro_batch_tokens (same result) or data.max_seq_len, or free memory; then go "
            "on with resume=<run folder>."
        ) from error


def _train(job: Job, inputs: Inputs, overrides: list[str]) -> RunResult:
    cfg, path, model = job.cfg, job.path, job.cfg["model"]
    tokenizer, template, data = inputs.tokenizer, inputs.template, inputs.data
    if model["chat_template"] == AUTO and not model["path"].startswith("builtin:"):
        say(f"note: model.chat_template=auto takes {template.name} for this tokenizer; set it to train another form.")
    _plan(job, inputs)
    cfg = job.cfg
    done = None if job.checkpoint is None else job.first_step
    job.finished = nothing_left(cfg, path, done=done, num_steps=data.num_steps)
    if not job.finished:
        # That of a shorter run, which is made longer here: it would say that this one has ended.
        (path / SUMMARY).unlink(missing_ok=True)
    if cfg["overwrite"] and not cfg["resume"]:
        clear_folder(path)
    write_config(path, cfg)
    write_json(path / "data_ledger.json", data.prepared.ledger.as_dict())
    record = dict(inputs.record)
    known = {"config_hash": config_hash(cfg), **record, **(adapter_hashes(cfg) if job.checkpoint is None else {})}
    write_manifest(path, seed=cfg["seed"], device=job.plan.describe(), fingerprints=known, overrides=overrides)
    job.trackers.open(cfg, path, first_step=job.first_step, rank=job.plan.rank)
    execution = chosen_execution(cfg["trainer"])
    with rich.get_console().status(Text(visible(f"loading {model['path']}"))):
        network = assembly.load_network(
            cfg, inputs.folder, tokenizer, job.plan, dense_base=execution.dense_base, kept=job.kept,
            identity=record["base_fingerprint"],
        )  # fmt: skip
    record["scaling"] = scaling(network)
    proof: dict[str, Any] = {"device": job.plan.device, "vocabulary": min(len(tokenizer), 4096)}
    precise = torch.autocast(job.plan.device.type, job.plan.compute_dtype, enabled=job.plan.precision != "32-true")
    with precise:
        prove_forward(network, **proof)
        if cfg["data"]["batch"] == "pairs":
            prove_shared_prefix(network, **proof)
    reference = start(cfg, network, record, folder=path, checkpoint=job.checkpoint)
    if cfg["trainer"]["checklist"]:
        with precise:
            fresh = job.checkpoint is None and not cfg["init_from"]
            job.proved.append(adapter_item(network, probe(proof["vocabulary"]).to(job.plan.device), fresh=fresh))
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


def _plan(job: Job, inputs: Inputs) -> None:
    """Show what became of the rows, settle what is left to the device's memory, and plan the steps."""
    data = inputs.data
    rich.get_console().print(data.prepared.ledger.render())
    for line in data.prepared.warnings:
        say(f"note: {line}")
    # A base that is kept is used again, or freed before another is loaded: its room is this run's.
    held = job.kept.device_bytes if job.kept else 0
    found = plan_memory(job.cfg, job.plan, inputs.folder, samples_of(job.cfg, data, num_ranks=job.plan.num_ranks), held=held)
    for line in found.describe():
        say(line)
    # The run goes on with what was chosen.
    job.cfg = {**job.cfg, "trainer": found.settled(job.cfg["trainer"])}
    plan_steps(job.cfg, data, num_ranks=job.plan.num_ranks)
    data.first_step = job.first_step


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
