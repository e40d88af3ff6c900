"""Tiny random models of each family that people train, in float64, with every bias and norm away from its first value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from fine_tune.models import attention

WINDOW = 5
SMALL: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None,
}  # fmt: skip
# Per family: its classes and what tells it from the others.
KINDS: dict[str, tuple[type[PretrainedConfig], type[nn.Module], dict[str, Any]]] = {
    # Grouped heads, a rotary base of its own.
    "llama3": (LlamaConfig, LlamaForCausalLM, {"rope_theta": 500_000.0}),
    # Biases on queries, keys and values.
    "qwen25": (Qwen2Config, Qwen2ForCausalLM, {}),
    # The same with a window in its upper layers only.
    "qwen25_window": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    # A window in every layer, shorter than most sequences.
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": WINDOW}),
    # One norm for attention and feed-forward part, LayerNorm, biases everywhere, a rotary part of each head, a biased head.
    "phi2": (PhiConfig, PhiForCausalLM, {"num_key_value_heads": 6, "partial_rotary_factor": 0.5, "hidden_act": "gelu_new"}),
}
# Adapted linear layers of one decoder layer.
LINEARS = {"llama3": 7, "qwen25": 7, "qwen25_window": 7, "mistral": 7, "phi2": 6}


def family(kind: str, *, tied: bool, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Make a model of a family with packed attention, every weight drawn."""
    config, model, options = KINDS[kind]
    torch.manual_seed(3)
    made: Any = model(config(**{**SMALL, **options}, tie_word_embeddings=tied))
    generator = torch.Generator().manual_seed(4)
    for name, parameter in made.named_parameters():
        # Biases start at zero and norms at one, where forgetting them would not show.
        if parameter.ndim == 1:
            start = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.data = start + 0.3 * torch.randn(parameter.shape, generator=generator)
    attention.register()
    made.to(dtype).set_attn_implementation(attention.PACKED)
    return made.requires_grad_(False)  # type: ignore[no-any-return]


def norms_in_one_dtype(patch: pytest.MonkeyPatch) -> None:
    """Keep norms out of float32, where the order of additions before them would show in the eighth digit."""

    def forward(self: Any, states: Tensor) -> Tensor:
        return self.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm):
        patch.setattr(norm, "forward", forward)
