"""What stands beside the merged weights: config, generation settings, tokenizer, and the base's licence and code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fine_tune.models.export import write_tokenizer
from fine_tune.storage import write_json
from fine_tune.text.template import ChatTemplate

# They speak of how the base was stored, or where.
DROPPED = ("quantization_config", "torch_dtype", "_name_or_path", "transformers_version")
LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def write_config(folder: Path, base: Path, *, rows: int, tied: bool, dtype: torch.dtype, pad_id: int | None) -> None:
    """Write the base's config as it holds for the merged weights.

    Args:
        folder: The merged model's.
        base: The base's.
        rows: Rows of the input embedding.
        tied: Input embedding and output head are one tensor.
        dtype: Of the weights.
        pad_id: The padding token.
    """
    config: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in DROPPED}
    text = kept if "vocab_size" in kept or "text_config" not in kept else kept["text_config"]
    text["vocab_size"] = rows
    kept |= {"dtype": str(dtype).removeprefix("torch."), "tie_word_embeddings": tied, "pad_token_id": pad_id}
    write_json(folder / "config.json", kept)


def write_generation(folder: Path, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> None:
    """Write when generation ends; the base's sampling settings were made for another model and are left out."""
    found = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": list(stop_ids),
        "pad_token_id": tokenizer.pad_token_id,
    }
    write_json(folder / "generation_config.json", {key: value for key, value in found.items() if value is not None})


def write_text(
    folder: Path, base: Path, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, *, code: bool
) -> None:
    """Write tokenizer and chat template, and copy the licence, and the model's own code where it needs some."""
    write_tokenizer(folder, tokenizer, template)
    for pattern in (*LEGAL, "*.py") if code else LEGAL:
        for file in base.glob(pattern):
            shutil.copyfile(file, folder / file.name)
