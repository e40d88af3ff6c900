"""The shape of a decoder, read from its config without loading a weight."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

PROBE_TOKENS = 4
# Characters of another library's message.
MAX_SAID = 120


@dataclass(frozen=True)
class LinearShape:
    """A linear layer: its name within the model, its widths, and which input it reads (equal numbers share one)."""

    name: str
    in_features: int
    out_features: int
    source: int


@dataclass(frozen=True)
class ModelShape:
    """What decides the memory of a decoder whose layers are alike.

    Attributes:
        linears: Linear layers of the first decoder layer, in the order in which they run.
        num_layers: Decoder layers.
        hidden: Width of the residual stream.
        attention: Width of the heads together, and ``heads`` their number.
        vocabulary: Rows of the output head.
        other: Weights outside the layers' linear ones: embeddings, head if it is not tied, norms, biases.
    """

    linears: tuple[LinearShape, ...]
    num_layers: int
    hidden: int
    attention: int
    heads: int
    vocabulary: int
    other: int

    @property
    def linear_weights(self) -> int:
        """Weights of all linear layers in the decoder's layers."""
        return self.num_layers * sum(one.in_features * one.out_features for one in self.linears)


class UnknownShape(Exception):
    """A model's shape cannot be read; the message says why, to stand in brackets."""


def read_shape(folder: Path, *, trust_remote_code: bool = False) -> ModelShape:
    """Read a model's shape from its folder; a process that asks again is answered from memory.

    Raises:
        UnknownShape: It does not run without weights, or is built otherwise, such as a mixture of experts.
    """
    file = folder / "config.json"
    if trust_remote_code or not file.is_file():
        return _read(folder, trust_remote_code=trust_remote_code)
    return _read_once(folder, file.read_bytes())


@functools.lru_cache(maxsize=16)
def _read_once(folder: Path, content: bytes) -> ModelShape:
    # Without code of its own, its config decides a model's shape.
    return _read(folder, trust_remote_code=False)


def _read(folder: Path, *, trust_remote_code: bool) -> ModelShape:
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code, attn_implementation="eager", dtype=torch.bfloat16
            )
        return shape_of(model)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ImportError) as error:
        # Whatever a model does that has no meaning without values. Told with its reason: who asks goes on without a plan, or stops.
        said = next(iter(str(error).strip().splitlines()), "")
        raise UnknownShape(f"it does not run without weights: {type(error).__name__}: {said[:MAX_SAID]}") from error


def shape_of(model: PreTrainedModel) -> ModelShape:
    """Read the shape of a model on the meta device by running a few tokens through it.

    Raises:
        UnknownShape: Its layers are not found, differ in size, or multiply by other weights than those of linear layers.
    """
    groups = [child for child in getattr(model, model.base_model_prefix).children() if isinstance(child, nn.ModuleList)]
    layers = [layer for group in groups for layer in group]
    name = type(model).__name__
    if not layers:
        raise UnknownShape(f"the layers of {name} are not where other models have theirs")
    if any(_num_weights(layer) != _num_weights(layers[0]) for layer in layers):
        raise UnknownShape(f"the layers of {name} are not all of one size")
    linears = _linears(model, layers[0])
    matrices = sum(weight.numel() for weight in layers[0].parameters() if weight.ndim > 1)
    if not linears or matrices != sum(one.in_features * one.out_features for one in linears):
        # Experts, or whatever else multiplies without being a linear layer that ran.
        raise UnknownShape(f"the layers of {name} hold experts or other weights that are no linear layers")
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    inside = len(layers) * sum(one.in_features * one.out_features for one in linears)
    return ModelShape(
        linears=tuple(linears),
        num_layers=len(layers),
        hidden=config.hidden_size,
        attention=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        heads=heads,
        vocabulary=model.get_output_embeddings().weight.shape[0],
        other=sum(weight.numel() for weight in model.parameters()) - inside,
    )


def _num_weights(layer: nn.Module) -> int:
    return sum(weight.numel() for weight in layer.parameters())


def _linears(model: PreTrainedModel, layer: nn.Module) -> list[LinearShape]:
    """Run the model and note which linear layers of ``layer`` run, and on what."""
    names = {module: name for name, module in model.named_modules()}
    # Inputs are kept, so that no two of them can be at one address.
    inputs: list[Any] = []
    found: list[LinearShape] = []

    def note(module: Any, given: Sequence[Any]) -> None:
        known = [i for i, one in enumerate(inputs) if one is given[0]]
        if not known:
            inputs.append(given[0])
        source = known[0] if known else len(inputs) - 1
        found.append(LinearShape(names[module], module.in_features, module.out_features, source))

    hooks = [m.register_forward_pre_hook(note) for m in layer.modules() if isinstance(m, nn.Linear)]
    size = (1, PROBE_TOKENS)
    with torch.no_grad(), torch.device("meta"):
        ids = torch.zeros(size, dtype=torch.long)
        mask = torch.zeros(1, 1, PROBE_TOKENS, PROBE_TOKENS, dtype=model.dtype)
        # Positions and a mask of our own: models look into theirs for values, and there are none.
        model(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found
