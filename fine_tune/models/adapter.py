"""The part that trains: a LoRA adapter (or every weight), its state, and where it may be loaded from."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from fine_tune import safe_load
from fine_tune.errors import CheckpointError, ConfigError
from fine_tune.models.adapter_source import (
    IDENTITY_FILE,
    PEFT_CONFIG,
    WEIGHTS_HASH,
    check_base,
    check_settings,
    find_adapter,
    read_settings,
)
from fine_tune.models.vocabulary import trained_tables
from fine_tune.storage import sha256

ADAPTER = "default"
# What scales an adapter's update: PEFT's key and ours.
SCALING = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "rank_stabilized", "use_dora": "use_dora"}


@dataclass(frozen=True)
class AdapterSpec:
    """What is trained.

    ``trains`` is ``adapter`` or ``all``. LoRA's update is scaled by alpha / rank, or by alpha / sqrt(rank) when
    ``rank_stabilized`` (Kalajdzievski 2023, arXiv:2312.03732). ``new_tokens`` are ids whose embeddings train too.
    """

    trains: str
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    rank_stabilized: bool = False
    use_dora: bool = False
    new_tokens: list[int] = field(default_factory=list)


def attach(model: PreTrainedModel, spec: AdapterSpec) -> PreTrainedModel | PeftModel:
    """Add the trainable part in float32 and leave everything else frozen; call after seeding.

    Raises:
        ConfigError: ``method.target_modules`` names nothing in this model.
    """
    if spec.trains == "all":
        model.requires_grad_(True)
        return model
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]
        lora_dropout=spec.dropout,
        target_modules=spec.target_modules,
        use_rslora=spec.rank_stabilized,
        use_dora=spec.use_dora,
        trainable_token_indices=dict.fromkeys(trained_tables(model), spec.new_tokens) if spec.new_tokens else None,
    )
    try:
        adapted = get_peft_model(model, config, adapter_name=ADAPTER, autocast_adapter_dtype=True)
    except ValueError as error:
        raise ConfigError(f"method.target_modules={spec.target_modules}: {error}") from error
    adapted.train()
    return adapted


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """Return the causal language model inside an adapted model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name every parameter that trains, in a stable order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return what trains as PEFT's own keys (adapter) or parameter names (all weights), on the CPU."""
    if isinstance(model, PeftModel):
        state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    else:
        state = dict(trainable(model))
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in sorted(state.items())}


def load_trained_state(model: nn.Module, state: dict[str, Tensor], *, origin: str) -> None:
    """Put a saved state back; every tensor must be there, and none may be left over.

    Raises:
        CheckpointError: Names or shapes differ from this model's; both sides are counted and three are named.
    """
    mine = trained_state(model)
    problems = sorted(set(mine) ^ set(state))
    problems += [name for name in mine.keys() & state.keys() if mine[name].shape != state[name].shape]
    if problems:
        raise CheckpointError(
            f"{origin} does not fit this model: {len(problems)} of {len(mine)} tensors differ in name or shape, "
            f"for example {', '.join(problems[:3])}. Use the method.rank, method.target_modules and model it was made with."
        )
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, state, adapter_name=ADAPTER)
        return
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.copy_(state[name])


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Run the block on the base alone; what trains is the same afterwards."""
    if not isinstance(model, PeftModel):
        raise ConfigError("method=full has no adapter to switch off: its base answers are taken before training.")
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        # PEFT turns gradients on for every adapter weight on the way out.
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])


def save_adapter_folder(model: nn.Module, folder: Path, identity: dict[str, Any]) -> None:
    """Write a PEFT folder (or a whole model when everything trains) with the identity of its base beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # PEFT asks the hub for the base's config to compare vocabularies; the answer is in identity already.
        warnings.simplefilter("ignore")
        if isinstance(model, PeftModel):
            model.save_pretrained(str(folder), save_embedding_layers=False)
        else:
            causal_lm(model).save_pretrained(str(folder))
    if isinstance(model, PeftModel):
        identity = {**identity, WEIGHTS_HASH: sha256(folder / "adapter_model.safetensors")}
    (folder / IDENTITY_FILE).write_text(json.dumps(identity, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_adapter(folder: Path, base_fingerprint: str, *, key: str = "init_from") -> str | None:
    """Tell, before anything is loaded, whether a folder holds an adapter of this base; a foreign one gives one warning.

    Args:
        folder: A run, a checkpoint in one, or a PEFT adapter folder.
        base_fingerprint: Of the base that it is meant for.
        key: What the config calls the folder, for messages.

    Raises:
        CheckpointError: The folder is no adapter, its base is another one, or it has settings that ours do not have.
        UnsafeArtifact: Its weights are a pickle file.
    """
    weights, identity = find_adapter(folder, key=key)
    warning = check_base(folder, identity, base_fingerprint, key=key)
    check_settings(folder, weights.parent, key=key)
    return warning


def adapter_record(folder: Path, *, key: str = "init_from") -> dict[str, Any]:
    """Return what an adapter of ours says about itself (base, template, tokenizer, step); nothing for a foreign one."""
    _, identity = find_adapter(folder, key=key)
    return read_settings(identity, key=key) if identity.is_file() else {}


def load_initial_adapter(
    model: nn.Module, folder: Path, base_fingerprint: str, *, key: str = "init_from"
) -> str | None:
    """Start from an earlier adapter: ours (its base is checked) or a foreign PEFT folder (returns one warning).

    Args:
        model: The freshly adapted model.
        folder: A run, a checkpoint in one, or a PEFT adapter folder.
        base_fingerprint: Of the base that ``model`` stands on.
        key: What the config calls the folder, for messages.

    Raises:
        CheckpointError: The folder is no adapter, its base is another one, or its rank, scaling or settings differ.
        UnsafeArtifact: Its weights are a pickle file.
    """
    weights, _ = find_adapter(folder, key=key)
    warning = check_adapter(folder, base_fingerprint, key=key)
    _check_scaling(model, weights.parent, origin=f"{key}={folder}")
    load_trained_state(model, safe_load.tensors(weights), origin=f"{key}={folder}")
    return warning


def spec_of_folder(folder: Path) -> AdapterSpec:
    """Read an adapter's shape and scaling from its PEFT config.

    Raises:
        CheckpointError: The config is damaged.
    """
    found = read_settings(folder / PEFT_CONFIG, key="ckpt")
    try:
        return AdapterSpec(
            trains="adapter",
            rank=found["r"],
            alpha=found["lora_alpha"],
            target_modules=found["target_modules"],
            rank_stabilized=bool(found.get("use_rslora")),
            use_dora=bool(found.get("use_dora")),
            new_tokens=_trained_tokens(found),
        )
    except KeyError as error:
        raise CheckpointError(f"{folder / PEFT_CONFIG} does not say {error}. Restore it, or use another adapter.") from error


def _trained_tokens(config: dict[str, Any]) -> list[int]:
    """Return the ids whose embeddings an adapter trains, in the order of their rows in it."""
    indices = config.get("trainable_token_indices") or {}
    return list(next(iter(indices.values()), []) if isinstance(indices, dict) else indices)


def replace_adapter(model: nn.Module, spec: AdapterSpec) -> PreTrainedModel | PeftModel:
    """Take an adapter off, if there is one, and put a fresh one of another shape on the same base."""
    bare = model.unload() if isinstance(model, PeftModel) else model
    return attach(bare, spec)  # type: ignore[arg-type]


def find_adapter_file(folder: Path, *, key: str = "init_from") -> Path:
    """Return the weights of a run, a checkpoint or a PEFT folder."""
    return find_adapter(folder, key=key)[0]


def scaling(model: nn.Module) -> dict[str, Any]:
    """Return what scales an adapter's update, in PEFT's words; nothing when there is no adapter."""
    if not isinstance(model, PeftModel):
        return {}
    config = model.peft_config[ADAPTER].to_dict()
    return {key: config[key] for key in SCALING}


def _check_scaling(model: nn.Module, folder: Path, *, origin: str) -> None:
    """Refuse an adapter whose update would be scaled otherwise here than where it was trained."""
    theirs: dict[str, Any] = {}
    for file, part in ((PEFT_CONFIG, None), ("manifest.json", "scaling")):
        if (folder / file).is_file():
            found = read_settings(folder / file, key=origin.partition("=")[0])
            theirs = found.get(part, {}) if part else found
    mine = scaling(model)
    if isinstance(model, PeftModel) and (tokens := _trained_tokens(theirs)):
        # The rows fit any tokens: only their ids tell whose they are.
        ours = _trained_tokens(model.peft_config[ADAPTER].to_dict())
        if ours and ours != tokens:
            raise CheckpointError(
                f"{origin}: it trained the embeddings of tokens {tokens[:4]}, this run trains those of {ours[:4]}. Set "
                "model.add_tokens as it was there."
            )
    differ = [
        f"method.{SCALING[key]}={mine[key]} (it has {theirs[key]})"
        for key in mine
        if theirs.get(key, mine[key]) != mine[key]
    ]
    if differ:
        raise CheckpointError(f"{origin}: trained with other settings: {', '.join(differ)}. Set them to its values.")
