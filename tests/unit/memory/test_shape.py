"""Shapes read without weights are those of the model that is loaded."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PhiConfig, PretrainedConfig, Qwen2Config

from fine_tune.memory import shape as shape_module
from fine_tune.memory.shape import UnknownShape, read_shape
from fine_tune.models.hub import resolve_model

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
Qwen2Small = partial(Qwen2Config, num_key_value_heads=4)


def folder_of(config: PretrainedConfig, folder: Path) -> Path:
    config.save_pretrained(folder)
    return folder


def inputs_of(shape: object) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for one in shape.linears:  # type: ignore[attr-defined]
        groups.setdefault(one.source, []).append(one.name.rpartition(".")[2])
    return list(groups.values())


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config])
@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_shares_two_inputs(kind: Any, tied: bool, tmp_path: Path) -> None:
    config = kind(**SMALL, num_key_value_heads=2, tie_word_embeddings=tied)
    shape = read_shape(folder_of(config, tmp_path))
    assert inputs_of(shape) == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert [one.out_features for one in shape.linears] == [64, 32, 32, 64, 160, 160, 64]
    assert (shape.num_layers, shape.hidden, shape.attention, shape.heads, shape.vocabulary) == (3, 64, 64, 4, 100)


def test_phi_reads_one_input_three_times_and_more(tmp_path: Path) -> None:
    shape = read_shape(folder_of(PhiConfig(**SMALL), tmp_path))
    # Attention and the feed-forward part run side by side, on one normalised input.
    assert inputs_of(shape) == [["q_proj", "k_proj", "v_proj", "fc1"], ["dense"], ["fc2"]]


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Small, PhiConfig])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_counted_as_a_loaded_model_has_them(kind: Any, tied: bool, tmp_path: Path) -> None:
    config = kind(**SMALL, tie_word_embeddings=tied)
    shape = read_shape(folder_of(config, tmp_path))
    model = AutoModelForCausalLM.from_config(config)
    inside = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert shape.linear_weights == sum(m.weight.numel() for m in inside)
    assert shape.linear_weights + shape.other == sum(p.numel() for p in model.parameters())


def test_heads_wider_than_the_stream(tmp_path: Path) -> None:
    shape = read_shape(folder_of(LlamaConfig(**SMALL, head_dim=32), tmp_path))
    assert shape.attention == 128
    assert [one.in_features for one in shape.linears][3] == 128


def test_nothing_is_allocated_for_a_shape_of_billions(tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
    shape = read_shape(folder_of(config, tmp_path))
    assert shape.linear_weights > 60e9
    assert torch.get_default_dtype() == torch.float32


def test_a_model_that_does_not_run_without_values_has_no_shape(tmp_path: Path) -> None:
    from transformers import MixtralConfig, OPTConfig

    for heads in (2, 8):
        mixed = MixtralConfig(**SMALL, num_local_experts=4, num_key_value_heads=heads)
        with pytest.raises(UnknownShape, match=r"MixtralForCausalLM|does not run without weights: "):
            read_shape(folder_of(mixed, tmp_path / f"{heads}"))
    elsewhere = OPTConfig(hidden_size=64, ffn_dim=160, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
    with pytest.raises(UnknownShape, match=r"^the layers of OPTForCausalLM are not where other models have theirs$"):
        read_shape(folder_of(elsewhere, tmp_path / "opt"))


def test_what_stopped_a_shape_is_told_in_one_short_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(model: Any) -> Any:
        raise NotImplementedError("no kernel for 'aten::item' " + "x" * 500 + "\nregistered: everything else")

    monkeypatch.setattr(shape_module, "shape_of", stop)
    with pytest.raises(UnknownShape) as caught:
        read_shape(folder_of(LlamaConfig(**SMALL), tmp_path))
    said = str(caught.value)
    assert said.startswith("it does not run without weights: NotImplementedError: no kernel for 'aten::item' xxx")
    assert len(said) < 180
    assert "\n" not in said
    assert isinstance(caught.value.__cause__, NotImplementedError)


def test_the_packaged_model_has_one() -> None:
    folder = resolve_model("builtin:tiny")
    shape = read_shape(folder)
    assert shape.hidden == json.loads((folder / "config.json").read_text(encoding="utf-8"))["hidden_size"]
