"""Preference training where only a CUDA device can show it: shared prefixes in the varlen kernel, step 0 when compiled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import fine_tune
from fine_tune.models.adapter import trainable
from fine_tune.models.execution import prepare_layers
from fine_tune.models.forward import supervised_logps
from fine_tune.modules.dpo import DPOModule
from fine_tune.modules.optim import OptimSpec
from fine_tune.modules.ratios import Ratios
from fine_tune.modules.reference import FrozenAdapter, snapshot
from fine_tune.packing.batches import MicroBatch, Sample, StepBatch, pack
from fine_tune.speed import SPEEDS
from tests.gpu.test_gpu import model_of, plain_logps
from tests.integration.conftest import read_metrics

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]
PAIRS = ((40, 30, 22), (3, 60, 9), (70, 5, 41), (12, 1, 17))


def samples() -> list[Sample]:
    generator = np.random.default_rng(5)
    found = []
    for prompt, chosen, rejected in PAIRS:
        ids = generator.integers(0, 211, prompt + chosen + rejected)
        found.append(Sample(ids, np.arange(len(ids)) >= prompt, (prompt, prompt + chosen)))
    return found


def one_by_one(model: nn.Module) -> Tensor:
    parts = []
    for sample in samples():
        prompt, middle = sample.branches
        for answer in (sample.input_ids[prompt:middle], sample.input_ids[middle:]):
            ids = torch.from_numpy(np.concatenate([sample.input_ids[:prompt], answer])).cuda()
            parts.append(plain_logps(model, ids)[prompt - 1 :])
    return torch.cat(parts)


@pytest.mark.parametrize("kind", ["grouped", "windowed"])
def test_shared_prompts_are_as_near_to_float32_as_one_by_one(kind: str) -> None:
    model = model_of(kind)
    micro = pack(samples()).to("cuda")
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        exact = one_by_one(model)
        model.set_attn_implementation("packed")
        # The same shapes in float32 go through bucketed SDPA.
        assert (supervised_logps(model, micro) - exact).abs().max().item() < 1e-4
        model.to(torch.bfloat16)
        ours = supervised_logps(model, micro)
        model.set_attn_implementation("sdpa")
        plain = one_by_one(model)
    ours_error, plain_error = ((x - exact).square().mean().sqrt().item() for x in (ours, plain))
    assert ours_error < 1.2 * plain_error + 1e-4
    assert ours_error < 0.05


def adapted(seed: int = 1) -> nn.Module:
    """A bf16 base under a float32 adapter whose B is not zero."""
    model = model_of("grouped").to(torch.bfloat16).requires_grad_(False)
    network = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable(network).values():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.05).cuda()
    return network.train()


def module_of(network: nn.Module, reference: FrozenAdapter) -> DPOModule:
    spec = OptimSpec(build=torch.optim.AdamW, lr=1e-3)
    module = DPOModule(network, reference=reference, optim=spec, num_steps=1)
    return module.to("cuda")


def first_loss(module: DPOModule, micro: MicroBatch) -> tuple[float, float]:
    """Loss and largest reward of a first step, through the module's own pass and gate."""
    batch = StepBatch(0, 0, [micro], len(micro.targets), len(micro.samples), micro.num_tokens)
    ratios = Ratios(module.metric_names, torch.device("cuda"))
    with torch.autocast("cuda", torch.bfloat16):
        loss = module.micro_loss(micro, batch, ratios)
    loss.backward()
    assert module.gate is not None
    return loss.item(), module.gate._worst[0].item()  # type: ignore[index]


@pytest.mark.parametrize("speed", SPEEDS)
def test_step_0_shows_ln_2_in_bf16(speed: str) -> None:
    network = adapted()
    prepare_layers(network, SPEEDS[speed])
    module = module_of(network, FrozenAdapter(network, snapshot(network)))
    loss, reward = first_loss(module, pack(samples()).to("cuda"))
    assert abs(loss - np.log(2)) < 1e-4
    assert reward < 1e-4
    module.before_update(None)  # type: ignore[arg-type]
    gradients = [p.grad.abs().max().item() for p in trainable(network).values() if p.grad is not None]
    assert len(gradients) == len(trainable(network))
    assert max(gradients) > 0


@pytest.mark.parametrize("speed", ["plain", "balanced"])
def test_a_planted_reference_is_refused_in_bf16(speed: str) -> None:
    network = adapted()
    prepare_layers(network, SPEEDS[speed])
    planted = {name: value * 1.05 for name, value in snapshot(network).items()}
    module = module_of(network, FrozenAdapter(network, planted))
    first_loss(module, pack(samples()).to("cuda"))
    with pytest.raises(fine_tune.errors.ConfigError, match="the policy is not its reference"):
        module.before_update(None)  # type: ignore[arg-type]


def test_compiled_gradients_are_the_eager_ones_within_bf16_noise() -> None:
    found = []
    for speed in ("plain", "balanced"):
        network = adapted()
        prepare_layers(network, SPEEDS[speed])
        reference = FrozenAdapter(network, {name: value * 0.9 for name, value in snapshot(network).items()})
        first_loss(module_of(network, reference), pack(samples()).to("cuda"))
        found.append(torch.cat([p.grad.flatten() for p in trainable(network).values() if p.grad is not None]))
    eager, compiled_ = found
    assert (eager - compiled_).norm().item() < 0.05 * eager.norm().item()


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short QLoRA run of the built-in model in bf16: its B is not zero."""
    folder = tmp_path_factory.mktemp("sft") / "run"
    fine_tune.train([f"run_dir={folder}", "trainer.max_steps=20", *COMMON])
    return folder


COMMON = ["trainer=gpu", "trainer.speed=plain", "model.dtype=bfloat16", "data.num_eval_items=0", "callbacks.preview=null"]


def first_steps(sft: Path, run: Path, *more: str) -> list[float]:
    """Losses of a short DPO run that starts from the SFT run, ln 2 and no divergence at its step 0."""
    fine_tune.train(["objective=dpo", f"init_from={sft}", f"run_dir={run}", *COMMON, *more])
    lines = read_metrics(run)
    assert lines[0]["val/kl"] < 1e-6
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert abs(losses[0] - np.log(2)) < 1e-4
    return losses


def test_a_store_written_on_a_gpu_is_read_by_the_next_run(sft: Path, tmp_path: Path) -> None:
    more = [f"objective.reference_store={tmp_path / 'store'}", "trainer.max_steps=12"]
    filled, read = (first_steps(sft, tmp_path / name, *more) for name in ("filled", "read"))
    assert filled[0] == read[0]
    assert np.allclose(filled, read, atol=0.02)
    assert filled[-1] < filled[0] - 0.05
    assert len(list((tmp_path / "store").glob("*.safetensors"))) == 1


def test_a_compiled_run_starts_at_ln_2(sft: Path, tmp_path: Path) -> None:
    first_steps(sft, tmp_path / "run", "trainer.speed=balanced", "trainer.max_steps=3")
