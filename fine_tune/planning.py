"""What a training step will take of a device, before anything is loaded; and, asked for, one rehearsal of its fullest step."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fine_tune import assembly
from fine_tune.data.module import PackedDataModule, StepDataset
from fine_tune.device import DEVICE_KEYS, GB, DevicePlan, plan_absent, plan_device
from fine_tune.errors import ConfigError, MemoryExhausted
from fine_tune.fitting import build_module
from fine_tune.memory.choice import USABLE, choose
from fine_tune.memory.estimate import Footprint
from fine_tune.memory.shape import ModelShape, UnknownShape, read_shape
from fine_tune.memory_plan import Estimator, MemoryPlan, plan_memory
from fine_tune.models.adapter import trainable
from fine_tune.models.execution import prepare_layers
from fine_tune.models.fingerprint import base_fingerprint
from fine_tune.models.hub import resolve_model
from fine_tune.modules.optim import build_optimizer, clip_grad_norm
from fine_tune.modules.ratios import Ratios
from fine_tune.quiet import quiet_libraries
from fine_tune.speed import SPEEDS, chosen_execution
from fine_tune.starting import check_sources, start
from fine_tune.training_data import fullest_step, plan_steps, prepared_data, samples_of

# Optimizer steps whose micro-batches are looked at; a run's fullest one is hardly fuller than that of so many.
STEPS_LOOKED_AT = 200
# Tokens of a micro-batch, beyond which nobody asks.
MOST_TOKENS = 1 << 17


@dataclass(frozen=True)
class Rehearsal:
    """Two steps on the device: seconds of the second one, and bytes at the peak (None on a CPU)."""

    seconds: float
    peak: int | None


@dataclass(frozen=True)
class Planned:
    """A plan.

    Attributes:
        cfg: The config with everything settled.
        device: Its name.
        chosen: What a run would choose, and its footprint with full micro-batches.
        fullest: Step with the fullest micro-batch among those looked at, and that micro-batch's tokens.
        peak: The footprint of that step; None where the model's shape cannot be read.
        speeds: Per speed the most tokens that fit, and their footprint; empty on a CPU.
        rehearsal: What was measured.
        unknown: Why there is no ``peak``.
    """

    cfg: Mapping[str, Any]
    device: str
    chosen: MemoryPlan
    fullest: tuple[int, int]
    peak: Footprint | None
    speeds: Mapping[str, tuple[int, Footprint, bool]]
    rehearsal: Rehearsal | None = None
    unknown: str | None = None


def plan_run(cfg: Mapping[str, Any], *, card_gb: float | None, rehearse: bool) -> Planned:
    """Prepare the rows of a config, choose as a run would, and add up what its steps take.

    Args:
        cfg: A checked config.
        card_gb: Memory in GB (1e9 bytes) of a card that is not here; None plans for this machine.
        rehearse: Load the model and run the fullest step twice, here.

    Raises:
        ConfigError: A rehearsal on a card that is not here.
    """
    if rehearse and card_gb is not None:
        raise ConfigError("rehearse=true: needs the device itself. Leave card_gb out.")
    quiet_libraries()
    device, card = _device(cfg, card_gb)
    model = cfg["model"]
    folder = resolve_model(model["path"], revision=model["revision"], trust_remote_code=model["trust_remote_code"])
    tokenizer, template = assembly.load_text(model, folder)
    data = prepared_data(cfg, tokenizer, template)
    samples = samples_of(cfg, data, num_ranks=device.num_ranks)
    chosen = plan_memory(cfg, device, folder, samples, card=card)
    cfg = {**cfg, "trainer": chosen.settled(cfg["trainer"])}
    plan_steps(cfg, data, num_ranks=device.num_ranks)
    fullest = fullest_step(data)
    shape, unknown = _shape(folder, trust_remote_code=model["trust_remote_code"])
    peak = None if shape is None else Estimator.of(cfg, shape, device)(chosen.execution, fullest[1])
    name = f"a card of {card_gb:g} GB" if card_gb is not None else device.describe()
    speeds = _speeds(cfg, shape, device, chosen, samples.longest)
    found = Planned(cfg, name, chosen, fullest, peak, speeds, unknown=unknown)
    if not rehearse:
        return found
    try:
        return replace(found, rehearsal=_rehearse(cfg, device, folder, tokenizer, template.sha256, data, fullest[0]))
    except torch.OutOfMemoryError as error:
        predicted = f"no estimate: {unknown}" if peak is None else f"predicted {peak.total / 1e9:.2f} GB"
        raise MemoryExhausted(
            f"rehearsal: {name} ran out of memory ({predicted}). Lower trainer.micro_batch_tokens, or set trainer.speed=lean."
        ) from error


def _shape(folder: Path, *, trust_remote_code: bool) -> tuple[ModelShape | None, str | None]:
    """Read a model's shape, or why there is none: a step can be rehearsed without."""
    try:
        return read_shape(folder, trust_remote_code=trust_remote_code), None
    except UnknownShape as error:
        return None, str(error)


def _device(cfg: Mapping[str, Any], card_gb: float | None) -> tuple[DevicePlan, int | None]:
    trainer = cfg["trainer"]
    if card_gb is None:
        return plan_device(**{key: trainer[key] for key in DEVICE_KEYS}), None
    # A limit is one of the tensors on it, as the card's size is.
    sizes = [size for size in (card_gb, trainer["memory_limit_gb"]) if size is not None]
    return plan_absent(precision=trainer["precision"], capability=trainer["capability"]), int(min(sizes) * GB)


def _speeds(
    cfg: Mapping[str, Any], shape: ModelShape | None, device: DevicePlan, chosen: MemoryPlan, longest: int
) -> dict[str, tuple[int, Footprint, bool]]:
    """Per speed the most tokens that fit, up to the most that are tried."""
    if shape is None or chosen.free is None:
        return {}
    estimate, found = Estimator.of(cfg, shape, device), {}
    for name in SPEEDS:
        execution = chosen_execution({**cfg["trainer"], "speed": name})
        one = choose(
            {name: execution}, estimate, budget=USABLE * chosen.free, longest=longest, per_step=MOST_TOKENS, fixed=None,
            enough=MOST_TOKENS,
        )  # fmt: skip
        found[name] = (one.tokens, one.footprint, one.fits)
    return found


def _rehearse(
    cfg: Mapping[str, Any], device: DevicePlan, folder: Path, tokenizer: Any, template_hash: str, data: PackedDataModule,
    number: int,
) -> Rehearsal:  # fmt: skip
    """Run one optimizer step twice, the second time with optimizer state; nothing of it is kept."""
    identity = base_fingerprint(folder)
    check_sources(cfg, identity, template_hash=template_hash)
    execution = chosen_execution(cfg["trainer"])
    network = assembly.load_network(cfg, folder, tokenizer, device, dense_base=execution.dense_base)
    with tempfile.TemporaryDirectory() as scratch:
        reference = start(cfg, network, {"base_fingerprint": identity}, folder=Path(scratch), checkpoint=None)
    prepare_layers(network, execution)
    module = build_module(cfg, network, data, reference)
    trained = list(trainable(network).items())
    optimizer = build_optimizer(assembly.optim_spec(cfg["optim"]), trained, scaled=False)
    batch = StepDataset(data.prepared.train, data.planner, num_steps=data.num_steps)[number].to(device.device)
    cuda = device.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device.device)
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        for micro in batch.micro_batches:
            with torch.autocast(device.device.type, device.compute_dtype, enabled=device.precision != "32-true"):
                loss = module.micro_loss(micro, batch, Ratios(module.metric_names, device.device))
            loss.backward()
        clip_grad_norm([p for _, p in trained], cfg["optim"]["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize(device.device)
        seconds = time.perf_counter() - started
    return Rehearsal(seconds, torch.cuda.max_memory_allocated(device.device) if cuda else None)
