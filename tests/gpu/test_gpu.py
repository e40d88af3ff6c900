"""What only a CUDA device can show: the varlen kernel, half precision, 8-bit bases, paged optimizers, resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import fine_tune
from fine_tune.models import attention
from fine_tune.models.forward import prove_forward, supervised_logps
from fine_tune.packing.batches import pack
from tests.integration.conftest import read_metrics, small_job, stand_in  # noqa: F401 - a fixture

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]
SHAPE = {
    "vocab_size": 211, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


def model_of(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    attention.register()
    if kind == "windowed":
        model: torch.nn.Module = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=16))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.set_attn_implementation(attention.PACKED)
    return model.cuda()


@pytest.mark.parametrize("kind", ["grouped", "windowed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_varlen_kernel_is_as_near_to_float32_as_the_padded_path(kind: str, dtype: torch.dtype) -> None:
    model = model_of(kind)
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randint(0, 211, (n,), generator=generator) for n in (40, 7, 90, 23)]
    micro = pack([(ids.numpy(), (torch.arange(len(ids)) > 0).numpy()) for ids in samples]).to("cuda")
    with torch.no_grad():
        exact = supervised_logps(model, micro)
        model.to(dtype)
        ours = supervised_logps(model, micro)
        model.set_attn_implementation("sdpa")
        padded = torch.cat([plain_logps(model, ids.cuda()) for ids in samples])
    ours_error, padded_error = ((x - exact).square().mean().sqrt().item() for x in (ours, padded))
    assert ours_error < 1.2 * padded_error + 1e-4
    assert ours_error < 0.05


def plain_logps(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return logits.gather(-1, ids[1:, None]).squeeze(-1)


def test_a_kernel_that_ignores_the_segments_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("grouped").to(torch.bfloat16)
    assert prove_forward(model, device=torch.device("cuda"), vocabulary=211) < 0.1
    varlen = attention._varlen

    def leaking(q: torch.Tensor, *rest: torch.Tensor, segments: attention.Segments, **options: object) -> torch.Tensor:
        return varlen(q, *rest, segments=attention.Segments.of([q.shape[0]]).to(q.device), **options)

    monkeypatch.setattr(attention, "_varlen", leaking)
    with pytest.raises(fine_tune.errors.ConfigError, match="sees its neighbour"):
        prove_forward(model, device=torch.device("cuda"), vocabulary=211)


JOBS = {
    "qlora_bf16": ["method=qlora", "model.dtype=bfloat16"],
    "qlora_fp16": ["method=qlora", "model.dtype=float16", "trainer.precision=16-mixed"],
    "qlora8": ["method=qlora8", "model.dtype=bfloat16"],
    "lora_recomputed": ["method=lora", "model.dtype=bfloat16", "trainer.recompute=full"],
    "dora": ["method=dora", "model.dtype=bfloat16"],
    "full": ["method=full"],
    "paged_32bit": ["method=qlora", "model.dtype=bfloat16", "optim=paged_adamw_32bit"],
    "paged_8bit": ["method=qlora", "model.dtype=bfloat16", "optim=paged_adamw_8bit"],
}


@pytest.mark.parametrize("name", JOBS)
def test_every_method_learns(name: str, stand_in: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    job = [word for word in small_job(stand_in, tmp_path / "run") if word != "trainer=cpu"]
    if name == "full":
        job = [word for word in job if not word.startswith("method.")]
    # Compiling takes a minute; what compiled layers compute is in test_gpu_speed.
    words = ["trainer=gpu", "trainer.speed=plain", *JOBS[name], "trainer.max_steps=40", "optim.global_batch_size=16"]
    summary = fine_tune.train([*job, *words])
    losses = [line["train/loss"] for line in read_metrics(tmp_path / "run") if "train/loss" in line]
    assert sum(losses[-5:]) / 5 < losses[0] - 0.15, losses
    assert summary["peak_memory_gb"] > 0
    assert summary["skipped_steps"] <= 5
    json.dumps(summary, allow_nan=False)


def test_resume_goes_on_exactly_on_a_gpu(stand_in: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    more = ["trainer=gpu", "trainer.speed=plain", "model.dtype=bfloat16", "trainer.deterministic=true", "trainer.num_workers=0"]
    jobs = {}
    for name in ("straight", "stopped"):
        words = [word for word in small_job(stand_in, tmp_path / name / "run", *more) if word != "trainer=cpu"]
        jobs[name] = [word for word in words if not word.startswith("trainer.max_steps")]
    fine_tune.train([*jobs["straight"], "trainer.max_steps=9", "optim.schedule=constant_with_warmup"])
    fine_tune.train([*jobs["stopped"], "trainer.max_steps=5", "optim.schedule=constant_with_warmup"])
    fine_tune.train([f"resume={tmp_path / 'stopped' / 'run'}", "trainer.max_steps=9"])
    losses = [
        {line["step"]: line["train/loss"] for line in read_metrics(tmp_path / name / "run") if "train/loss" in line}
        for name in ("straight", "stopped")
    ]
    assert losses[0] == losses[1]
