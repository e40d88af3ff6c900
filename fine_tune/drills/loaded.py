"""A config's model, method and rows, loaded as a run loads them, but without dropout."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fine_tune import assembly
from fine_tune.data.module import StepDataset
from fine_tune.device import DEVICE_KEYS, plan_device
from fine_tune.drills.taking import Taker
from fine_tune.fitting import build_module
from fine_tune.memory_plan import plan_memory
from fine_tune.models.adapter import trainable
from fine_tune.models.execution import Execution, prepare_layers
from fine_tune.models.fingerprint import base_fingerprint
from fine_tune.models.hub import resolve_model
from fine_tune.modules.dpo import switch_off_dropout
from fine_tune.packing.batches import StepBatch
from fine_tune.speed import chosen_execution
from fine_tune.starting import check_sources, start
from fine_tune.training_data import plan_steps, prepared_data, samples_of

# With float64: the base is dense, and layers run as they are.
WIDE = Execution()


@dataclass
class Loaded:
    """A module that can take steps, the steps, and the config with everything settled."""

    cfg: dict[str, Any]
    taker: Taker
    steps: StepDataset
    execution: Execution

    @property
    def network(self) -> nn.Module:
        """The adapted model."""
        return self.taker.module.network

    def step(self, number: int) -> StepBatch:
        """Build this process's share of an optimizer step."""
        return self.steps[number]


def load(cfg: Mapping[str, Any], *, wide: bool) -> Loaded:
    """Load a config's model and rows on this process's device.

    Args:
        cfg: A checked config.
        wide: Everything in float64 (a 4-bit base made dense first) instead of the config's own precision.
    """
    cfg = {**cfg, "method": {**cfg["method"], "dropout": 0.0} if cfg["method"]["trains"] == "adapter" else cfg["method"]}
    if wide:
        cfg = {**cfg, "model": {**cfg["model"], "dtype": "float32"}, "trainer": {**cfg["trainer"], "precision": "32-true"}}
    plan = plan_device(**{key: cfg["trainer"][key] for key in DEVICE_KEYS})
    model = cfg["model"]
    folder = resolve_model(model["path"], revision=model["revision"], trust_remote_code=model["trust_remote_code"])
    tokenizer, template = assembly.load_text(model, folder)
    data = prepared_data(cfg, tokenizer, template)
    settled = plan_memory(cfg, plan, folder, samples_of(cfg, data, num_ranks=plan.num_ranks)).settled(cfg["trainer"])
    cfg = {**cfg, "trainer": settled}
    plan_steps(cfg, data, num_ranks=plan.num_ranks)
    identity = base_fingerprint(folder)
    check_sources(cfg, identity, template_hash=template.sha256)
    execution = WIDE if wide else chosen_execution(cfg["trainer"])
    dense = cfg["method"]["bits"] == 4 if wide else execution.dense_base
    network = assembly.load_network(cfg, folder, tokenizer, plan, dense_base=dense)
    if wide:
        network.double()
        keep_norms_wide(network)
    switch_off_dropout(network)
    with tempfile.TemporaryDirectory() as scratch:
        reference = start(cfg, network, {"base_fingerprint": identity}, folder=Path(scratch), checkpoint=None)
    prepare_layers(network, execution)
    module = build_module(cfg, network, data, reference)
    steps = StepDataset(data.prepared.train, data.planner, num_steps=data.num_steps, rank=plan.rank)
    return Loaded(cfg, Taker(module, plan), steps, execution)


def keep_norms_wide(network: nn.Module) -> int:
    """Let root-mean-square norms compute in their input's dtype; transformers' go through float32 and round there.

    Only those that compute what LLaMA's do: they are asked first. Returns how many.
    """
    found = [module for module in network.modules() if _is_plain_rms(module)]
    for module in found:
        module.forward = functools.partial(_rms, module)
    return len(found)


def _is_plain_rms(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not (isinstance(weight, nn.Parameter) and hasattr(module, "variance_epsilon")):
        return False
    asked = torch.linspace(-1.0, 2.0, 2 * weight.numel()).reshape(2, -1).to(weight)
    with torch.no_grad():
        return bool(torch.allclose(module(asked), _rms(module, asked), rtol=1e-5, atol=1e-6))


def _rms(module: Any, states: torch.Tensor) -> torch.Tensor:
    scaled: torch.Tensor = module.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
    return scaled


def num_weights(folder: Path) -> int | None:
    """Count a model's weights from the headers of its files; None where they are not to be had."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, entry in header.items():
            size = 1
            for length in entry.get("shape", ()) if name != "__metadata__" else (0,):
                size *= length
            total += size
    return total or None


@contextmanager
def layers_run(network: nn.Module) -> Iterator[Callable[[Execution], None]]:
    """Yield what lets layers run in another way; behind the block they run as before, and are not compiled anew.

    Adapted layers that take our operation go on doing so.
    """
    before = [(module, module._compiled_call_impl) for module in network.modules()]

    def run(execution: Execution) -> None:
        for module, _ in before:
            module._compiled_call_impl = None
        prepare_layers(network, replace(execution, fused_lora=False))

    try:
        yield run
    finally:
        for module, call in before:
            module._compiled_call_impl = call


@torch.no_grad()
def move(loaded: Loaded, gradients: Mapping[str, torch.Tensor]) -> None:
    """Move every weight that trains by the peak rate against its gradient's sign, as Adam's first update does."""
    rate = loaded.cfg["optim"]["lr"]
    for name, parameter in trainable(loaded.network).items():
        parameter.sub_(rate * gradients[name].sign().to(parameter.device, parameter.dtype))
