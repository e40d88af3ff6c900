"""Small models of several kinds with an adapter each, as folders, and merges that take a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers import models as token_models
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

from fine_tune import assembly
from fine_tune.device import plan_device
from fine_tune.evaluation_config import check_evaluation
from fine_tune.merging import merge as merging
from fine_tune.merging import reference, reload, reloaded
from fine_tune.merging.settings import MergeSettings
from fine_tune.models.adapter import trainable
from fine_tune.models.export import export_adapter
from fine_tune.models.fingerprint import base_fingerprint
from fine_tune.passport import prompts, replay

WORDS = ["<unk>", "<s>", "</s>", "<pad>", "###", "Human:", "Assistant:", *(f"w{i}" for i in range(33))]
SIZES = {
    "vocab_size": 48,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
Merge = Callable[..., dict[str, Any]]


def tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(token_models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def write_model(folder: Path, kind: str = "untied", *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a LLaMA with tied or untied embeddings, or a Phi, whose output head has a bias."""
    torch.manual_seed(0)
    model: Any
    if kind == "phi":
        model = PhiForCausalLM(PhiConfig(intermediate_size=128, **SIZES, **IDS))
        nn.init.normal_(model.lm_head.bias)
    else:
        tied = kind == "tied"
        config = LlamaConfig(intermediate_size=128, num_key_value_heads=2, tie_word_embeddings=tied, **SIZES, **IDS)
        model = LlamaForCausalLM(config)
    # Sharper than a fresh model, so that a wrong weight shows in the logits.
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.ndim > 1 else 1)
    model.to(dtype).save_pretrained(str(folder))
    tokenizer().save_pretrained(str(folder))
    return folder


def write_adapter(folder: Path, model: Path, *words: str) -> Path:
    """Write an adapter with random weights, exported as a run's is; return its folder."""
    cfg = check_evaluation(["ckpt=base", f"model.path={model}", "accelerator=cpu", *words])
    tokens, template = assembly.load_text(cfg["model"], model)
    plan = plan_device(accelerator="cpu", devices=1, num_nodes=1, precision="32-true")
    network = assembly.load_bare(cfg, model, tokens, plan)
    network = assembly.attach(network, assembly.adapter_spec(cfg, tokens))  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(network).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    identity = {"model": str(model), "revision": None, "base_fingerprint": base_fingerprint(model)}
    export_adapter(network, folder, identity=identity, tokenizer=tokens, template=template)
    return folder


def words_of(model: Path, *words: str) -> dict[str, Any]:
    return check_evaluation(["ckpt=base", f"model.path={model}", "accelerator=cpu", *words])


@pytest.fixture
def merge_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Merge:
    """Merge an adapter folder; the reload is done in this process, which takes no seconds for imports."""

    def in_process(place: Path) -> None:
        reload.main(json.loads((place / "question.json").read_text(encoding="utf-8")), place)

    monkeypatch.setattr(reloaded, "_run", in_process)
    # A collection takes longer than one of these models.
    monkeypatch.setattr(reference, "release", lambda device: None)
    # Fewer and shorter answers than a real proof takes.
    monkeypatch.setattr(prompts, "NUM_PROMPTS", 3)
    for module in (replay, reloaded):
        monkeypatch.setattr(module, "NUM_TOKENS", 6)

    def run(adapter: Path, model: Path, *words: str, **settings: Any) -> dict[str, Any]:
        cfg = words_of(model, *words)
        cfg["ckpt"] = str(adapter)
        return merging.merge(cfg, MergeSettings(**{"out": tmp_path / "merged", "dtype": "float32", **settings}))

    return run
