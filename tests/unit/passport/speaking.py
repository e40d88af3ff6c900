"""A small model that speaks through a chat template, and its passport."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers import models as token_models
from tokenizers.decoders import ByteLevel as Decoder
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fine_tune.models import attention
from fine_tune.models.export import write_tokenizer
from fine_tune.passport.document import stops, write_passport
from fine_tune.text.template import ChatTemplate, load_template

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and the markers of ChatML."""
    letters = sorted(ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    raw = Tokenizer(token_models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer, raw.decoder = ByteLevel(add_prefix_space=False), Decoder()
    raw.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def template() -> ChatTemplate:
    return load_template("chatml", bos_token="<s>", eos_token="</s>")


def network(seed: int = 0) -> Any:
    """Two sharp random layers: each prompt has a likeliest continuation of its own."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6 if p.ndim > 1 else 1)
        # It says letters only: half characters have a test of their own.
        silent = [i for token, i in tokenizer().get_vocab().items() if not (len(token) == 1 and token.isascii())]
        model.lm_head.weight[silent] = 0.0
        model.lm_head.weight *= 8
    attention.register()
    model.set_attn_implementation(attention.PACKED)
    return model


def write_folder(folder: Path, model: nn.Module | None = None) -> Path:
    """Write a whole artifact: model, tokenizer with its template, generation settings and passport."""
    model = network() if model is None else model
    tokens, form = tokenizer(), template()
    model.save_pretrained(str(folder))  # type: ignore[operator]
    write_tokenizer(folder, tokens, form)
    settings = {"eos_token_id": stops(tokens, form), "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    write_passport(folder, model, tokenizer=tokens, template=form, origin={"step": 3}, precision=torch.float32)
    return folder
