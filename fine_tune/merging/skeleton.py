"""A model without weights: which tensors it has, which are tied, and which of its layers are quantised on loading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.auto import AutoHfQuantizer

from fine_tune.errors import CheckpointError


@dataclass(frozen=True)
class Skeleton:
    """What a model's code says about its weights.

    Attributes:
        names: Its tensors, as a checkpoint names them.
        linear: Modules whose weight is ``[out, in]``.
        quantised: The modules that loading quantises, each with the settings of its weight.
        embedding: The input embedding's name.
        head: The output head's name.
        tied: Input embedding and output head are one tensor.
    """

    names: list[str]
    linear: set[str]
    quantised: dict[str, dict[str, Any]]
    embedding: str
    head: str
    tied: bool


def skeleton(folder: Path, method: Mapping[str, Any], *, trust_remote_code: bool) -> Skeleton:
    """Build a model on the meta device and let transformers choose the layers to quantise, as loading does.

    Raises:
        CheckpointError: The folder's weights are quantised already.
    """
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"{folder}: its weights are quantised already. Set model.path to the unquantised model.")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    modules = dict(model.named_modules())
    of = {id(module): name for name, module in modules.items()}
    return Skeleton(
        names=list(model.state_dict()),
        linear={name for name, module in modules.items() if isinstance(module, nn.Linear)},
        embedding=of[id(model.get_input_embeddings())],
        head=of[id(model.get_output_embeddings())],
        tied=bool(config.get_text_config().tie_word_embeddings),
        quantised=_quantised(model, method),
    )


def _quantised(model: Any, method: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Replace layers on the meta device; call last, it changes the model."""
    if method["bits"] == 16:
        return {}
    settings = BitsAndBytesConfig(
        load_in_4bit=method["bits"] == 4,
        load_in_8bit=method["bits"] == 8,
        bnb_4bit_quant_type=method["quant_type"] or "nf4",
        bnb_4bit_use_double_quant=method["double_quant"],
    )
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    return {
        name: {key: value for key, value in module.weight.__dict__.items() if key != "module"}
        for name, module in model.named_modules()
        if type(module).__module__.startswith("bitsandbytes.")
    }
