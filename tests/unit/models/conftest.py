"""Tiny random models and word-level tokenizers, as folders and in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers import models as token_models
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fine_tune.losses.sft import sft_loss
from fine_tune.models import attention
from fine_tune.models.adapter import trainable
from fine_tune.models.base import BaseSpec
from fine_tune.models.forward import supervised_logps
from fine_tune.packing.batches import MicroBatch, pack

VOCABULARY = 48
Save = Callable[..., Path]


def llama(*, seed: int = 0, tied: bool = False, bias: bool = False) -> LlamaForCausalLM:
    """Two layers in float32, frozen, with packed attention."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if bias:
        model.lm_head.bias = nn.Parameter(torch.randn(VOCABULARY))
    attention.register()
    model.set_attn_implementation(attention.PACKED)
    return model.requires_grad_(False).train()


def base_spec(
    folder: Path, *, bits: int = 16, dtype: torch.dtype = torch.float32, double_quant: bool = True
) -> BaseSpec:
    return BaseSpec(folder, bits, dtype, torch.float32, torch.device("cpu"), double_quant=double_quant)


def micro_batch(*, low: int = 0, high: int = VOCABULARY) -> MicroBatch:
    """Three rows of fixed random tokens, everything but the first token supervised."""
    generator = np.random.default_rng(4)
    rows = [(generator.integers(low, high, n), np.arange(n) > 0) for n in (9, 4, 6)]
    return pack(rows)


def train_steps(network: nn.Module, num: int = 3, *, lr: float = 1e-2) -> list[float]:
    """Plain AdamW on one micro-batch; returns the losses."""
    optimizer = torch.optim.AdamW(list(trainable(network).values()), lr=lr)
    micro, losses = micro_batch(), []
    for _ in range(num):
        loss = sft_loss(supervised_logps(network, micro), num_step_tokens=len(micro.rows))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def randomize(network: nn.Module, seed: int = 1) -> None:
    """Move what trains away from its start, where B = 0 hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable(network).values():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1


def word_tokenizer(*words: str, **special: str) -> PreTrainedTokenizerFast:
    """Whole words only; ``special`` names its special tokens, as in ``eos_token="</s>"``."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    raw = Tokenizer(token_models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = WhitespaceSplit()
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **named)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved base; read only."""
    folder = tmp_path_factory.mktemp("models") / "base"
    llama().save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def exact_norm() -> Iterator[None]:
    """Keep transformers' norm in float64; it goes through float32 otherwise and rounds there."""

    def forward(self: LlamaRMSNorm, states: Tensor) -> Tensor:
        return self.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", forward)
        yield
