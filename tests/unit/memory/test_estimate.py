"""Footprints: against what autograd keeps on a small model, and against peaks measured on a GPU (docs/experiments.md)."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fine_tune.memory.estimate import Footprint, Step, Stored, Trained, base_bytes, footprint, num_trained
from fine_tune.memory.shape import LinearShape, ModelShape, shape_of
from fine_tune.models.adapter import AdapterSpec, attach, trainable
from fine_tune.models.attention import register
from fine_tune.models.execution import Execution
from fine_tune.speed import SPEEDS

WIDTHS = (("q", 4096, 4096, 0), ("k", 4096, 4096, 0), ("v", 4096, 4096, 0), ("o", 4096, 4096, 1))
WIDTHS += (("gate", 4096, 11008, 2), ("up", 4096, 11008, 2), ("down", 11008, 4096, 3))
LLAMA = ModelShape(tuple(LinearShape(*one) for one in WIDTHS), 32, 4096, 4096, 32, 32_000, 262_410_240)
ALL = LLAMA.linears


def peak(speed: str | Execution, tokens: int, *, rank: int = 64, bits: int = 4, **trained: object) -> Footprint:
    execution = SPEEDS[speed] if isinstance(speed, str) else speed
    stored = Stored(bits, 2, dense_base=execution.dense_base)
    return footprint(LLAMA, stored, Trained(rank, ALL, **trained), execution, Step(tokens, 2, 1024))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("speed", "tokens", "options", "measured"),
    [
        ("balanced", 8192, {}, 31.9),
        ("balanced", 6144, {}, 25.6),
        ("fast", 8192, {}, 42.1),
        ("fast", 6144, {}, 33.2),
        ("lean", 5632, {}, 7.67),
        ("lean", 6144, {}, 7.75),
        ("lean", 5120, {"rank": 16}, 5.64),
        ("balanced", 8192, {"bits": 16}, 41.5),
        ("plain", 4096, {}, 29.7),
        ("plain", 6144, {}, 40.9),
        ("plain", 4096, {"bits": 16}, 43.6),
        (Execution("full"), 8192, {}, 9.9),
        (Execution("selective"), 8192, {}, 56.5),
        ("plain", 4096, {"dropout": True, "state_bytes": 0}, 36.7),
        (Execution("full"), 2048, {"dropout": True, "state_bytes": 0}, 6.4),
    ],
)
def test_within_a_tenth_of_what_was_measured_on_a_gpu(
    speed: str | Execution, tokens: int, options: dict[str, object], measured: float
) -> None:
    assert peak(speed, tokens, **options).total / 1e9 == pytest.approx(measured, rel=0.1)  # type: ignore[arg-type]


def test_the_parts_of_a_qlora_step_by_hand() -> None:
    found = peak("balanced", 1000)
    # 4 bits and their scales, and embeddings, head and norms in bf16; weight, gradient and two moments in float32.
    assert found.base == pytest.approx(6_476_005_376 * (0.5 + 1 / 64 + 1 / 4096) + 262_410_240 * 2, rel=1e-9)
    assert found.trained == 159_907_840 * 16
    # Per layer: q, k, v, o, gate, up; attention and input; seven times 64 of LoRA; and 32 sums of attention in float32.
    assert found.kept == 1000 * 32 * (2 * (4 * 4096 + 2 * 11008 + 2 * 4096 + 7 * 64) + 4 * 32)
    assert found.total == found.base + found.trained + found.kept + found.working


def small(**options: object) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=50, **options
    )
    register()
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_kept_bytes_are_what_autograd_keeps(key_value_heads: int) -> None:
    """Plain layers of a small model in float32, tensors that autograd saves counted once per storage."""
    with torch.device("meta"):
        shape = shape_of(small(num_key_value_heads=key_value_heads))
    assert shape is not None
    model = attach(
        small(num_key_value_heads=key_value_heads, attn_implementation="sdpa"), AdapterSpec("adapter", rank=4, alpha=8)
    )
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tokens, kept = 512, {}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        place = saved.untyped_storage().data_ptr()
        if place not in parameters and saved.numel() >= tokens * 4:
            kept[place] = saved.untyped_storage().nbytes()
        return saved

    inner = model.get_base_model().model  # type: ignore[operator, union-attr]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        out = inner(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False).last_hidden_state
    assert out.requires_grad
    stored, step = Stored(16, 4), Step(tokens, 4, 64)
    found = footprint(shape, stored, Trained(4, shape.linears), Execution(), step)
    # PEFT's cast costs no copy in float32, which the formula for dense layers counts in half precision.
    again = sum(o.in_features for o in shape.linears) - sum({o.source: o.in_features for o in shape.linears}.values())
    expected = found.kept - tokens * shape.num_layers * 4 * again
    assert sum(kept.values()) == pytest.approx(expected, rel=0.15)


def test_trained_weights_are_those_of_peft() -> None:
    with torch.device("meta"):
        shape = shape_of(small())
    assert shape is not None
    model = attach(small(), AdapterSpec("adapter", rank=6, alpha=8, target_modules=["q_proj", "down_proj"]))
    adapted = tuple(one for one in shape.linears if one.name.endswith(("q_proj", "down_proj")))
    assert num_trained(shape, Trained(6, adapted)) == sum(p.numel() for p in trainable(model).values())
    everything = Trained(everything=True)
    assert num_trained(shape, everything) == sum(p.numel() for p in small().parameters())
    assert base_bytes(shape, Stored(16, 2), everything) == 0


def test_each_choice_moves_what_it_is_for() -> None:
    balanced = peak("balanced", 4096)
    assert peak("fast", 4096).kept > balanced.kept > peak(Execution("full"), 4096).kept > peak("lean", 4096).kept
    dense = peak(Execution("selective", compile=True, fused_lora=True, dense_base=True), 4096)
    assert dense.base == 2 * (6_476_005_376 + 262_410_240)
    assert dense.kept == balanced.kept
    assert dense.working < balanced.working
    assert peak("balanced", 4096, num_copies=1).trained - balanced.trained == 159_907_840 * 4
    assert peak("balanced", 4096, state_bytes=0).trained == 159_907_840 * 8
    # What was dropped is dropped again, in the backward pass of its layer.
    assert peak("balanced", 4096, dropout=True).kept == balanced.kept
    assert peak("balanced", 4096, dropout=True).working > balanced.working
    assert peak("fast", 4096, dropout=True).kept > peak("fast", 4096).kept
    doubled = peak("balanced", 8192)
    assert doubled.kept == 2 * balanced.kept
    assert (doubled.base, doubled.trained) == (balanced.base, balanced.trained)


def test_scales_of_plain_and_double_quantisation() -> None:
    nothing = Trained(64, ALL)
    plain, double = (base_bytes(LLAMA, Stored(4, 2, double_quant=twice), nothing) for twice in (False, True))
    # Dettmers et al. 2023, section 3: 0.5 bits per parameter become 0.127.
    assert (plain - double) * 8 / LLAMA.linear_weights == pytest.approx(0.5 - 0.127, abs=1e-3)


def test_a_large_vocabulary_shows_in_the_head() -> None:
    wide = ModelShape(**{**LLAMA.__dict__, "vocabulary": 152_000})
    step = Step(1024, 2, 1024)
    found, before = (
        footprint(one, Stored(4, 2), Trained(64, ALL), SPEEDS["lean"], step).working for one in (wide, LLAMA)
    )
    # Fewer rows at a time: what words add is their own copies of one chunk, not a chunk of more words.
    assert found == 220 * 152_000 * 8 + 3 * 1024 * 4096 * 2
    assert abs(found - before) < 1024 * 1024 * 8
