"""Load the frozen base: quantised or not, on one device, with an explicit dtype."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from fine_tune.errors import ConfigError, EnvironmentProblem, MemoryExhausted
from fine_tune.kernels.whole_blocks import read_in_whole_blocks
from fine_tune.models import attention

# Heads whose logits are more than weight @ hidden + bias: the chunked head would be silently wrong for them.
SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@dataclass(frozen=True)
class BaseSpec:
    """How the base is stored.

    ``bits`` 4, 8 or 16 (not quantised); ``dtype`` of everything that is not quantised; ``compute_dtype`` of 4-bit
    products. ``device`` is one device: quantised layers cannot be moved later.
    """

    folder: Path
    bits: int
    dtype: torch.dtype
    compute_dtype: torch.dtype
    device: torch.device
    quant_type: str = "nf4"
    double_quant: bool = True
    trust_remote_code: bool = False


def load_base(spec: BaseSpec) -> PreTrainedModel:
    """Load the base in train mode with packed attention, every parameter frozen.

    Raises:
        ConfigError: The model computes something this framework does not (named).
        EnvironmentProblem: bitsandbytes is missing, or the files cannot be loaded.
        MemoryExhausted: The weights do not fit the device.
    """
    attention.register()
    options: dict[str, Any] = {"quantization_config": _quantization(spec)} if spec.bits < 16 else {}
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            str(spec.folder),
            dtype=spec.dtype,
            device_map={"": str(spec.device)},
            attn_implementation=attention.PACKED,
            trust_remote_code=spec.trust_remote_code,
            local_files_only=True,
            # Never a pickle, also where a folder has no other weights.
            use_safetensors=True,
            **options,
        )
    except torch.OutOfMemoryError as error:
        raise MemoryExhausted(
            f"{spec.folder.name} does not fit {spec.device}: try method=qlora or a smaller model."
        ) from error
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise EnvironmentProblem(f"{spec.folder} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    _refuse_unknown(model)
    # Also where a folder was 4-bit already, whatever was asked for.
    four_bits = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for module in four_bits:
        # bitsandbytes repacks 4-bit weights in a no-grad forward on such CPUs; later gradients would be wrong.
        setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - not an attribute of every Module
    if four_bits:
        read_in_whole_blocks()
    model.requires_grad_(False)
    model.train()
    return model


def _quantization(spec: BaseSpec) -> BitsAndBytesConfig:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise EnvironmentProblem(
            "bitsandbytes is not installed, and method=qlora or qlora8 needs it: pip install bitsandbytes, or use method=lora."
        ) from error
    if spec.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.quant_type,
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_compute_dtype=spec.compute_dtype,
    )


def _refuse_unknown(model: PreTrainedModel) -> None:
    config, name = model.config, type(model).__name__
    if config._attn_implementation != attention.PACKED:
        raise ConfigError(f"model: {name} does not take another attention function. Choose a model that does.")
    for key in SCALED_LOGITS:
        if getattr(config, key, None) not in (None, 1, 1.0):
            raise ConfigError(f"model: {name} rescales its logits ({key}), which the chunked head does not compute.")


def output_head(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the output head's weight ``[V, H]`` and bias ``[V]`` or None, trained token rows included.

    Raises:
        ConfigError: The head is not a plain linear layer, for example because LoRA targets it.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    wrapper = getattr(head, "token_adapter", None)
    if wrapper is not None:
        weight = wrapper.weight if wrapper.disable_adapters else wrapper.get_merged_weights(wrapper.active_adapters)
        return weight, getattr(wrapper.base_layer, "bias", None)
    if type(head) is not nn.Linear:
        raise ConfigError(
            f"method.target_modules: the output head is a {type(head).__name__}; the chunked head needs a plain Linear. "
            "Leave lm_head out of the target modules."
        )
    return head.weight, head.bias


def decoder(model: PreTrainedModel) -> nn.Module:
    """Return the part of a causal language model that ends before the output head."""
    inner: nn.Module = getattr(model, model.base_model_prefix)
    return inner


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Switch the attention function: ``packed`` to train, ``sdpa`` to generate with a cache."""
    model.set_attn_implementation(name)
