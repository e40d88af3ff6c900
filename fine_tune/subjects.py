"""What `ckpt=` names: a run, a checkpoint in one, an adapter, a whole model, or the base; found, loaded, and switched."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from fine_tune import assembly, checkpoints, safe_load
from fine_tune.device import DevicePlan
from fine_tune.errors import CheckpointError, ConfigError, UnsafeArtifact
from fine_tune.evaluation.protocol import Subject
from fine_tune.models.adapter import (
    AdapterSpec,
    check_adapter,
    find_adapter_file,
    load_trained_state,
    replace_adapter,
    spec_of_folder,
)
from fine_tune.models.adapter_source import read_settings
from fine_tune.models.base import BaseSpec, load_base
from fine_tune.models.fingerprint import base_fingerprint
from fine_tune.models.fused_lora import fuse, fuse_frozen
from fine_tune.models.hub import resolve_model
from fine_tune.own_template import own_template
from fine_tune.storage import sha256
from fine_tune.text.template import ChatTemplate

BASE = "base"
TEXT_KEYS = ("chat_template", "end_of_turn", "pad_token", "add_tokens", "trust_remote_code")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Named:
    """One word of ``ckpt=``, found on disk.

    Attributes:
        label: A short name, unique among those evaluated together, safe as a folder's name.
        cfg: ``model``, ``method`` and ``data`` to load it with.
        weights: The adapter's file; None for the base and for whole models.
        run: The run it belongs to, if any.
        whole: It is a model of its own, evaluated unquantised in its own dtype.
        place: The folder whose name begins the label; None for ``base``.
    """

    label: str
    cfg: Mapping[str, Any]
    weights: Path | None
    run: Path | None
    whole: bool = False
    place: Path | None = None

    def base_key(self) -> str:
        """Name what is loaded underneath; checkpoints that agree in it share one loaded base."""
        model, method = self.cfg["model"], self.cfg["method"]
        stored = [method[key] for key in ("bits", "quant_type", "double_quant")]
        # What replaces every weight leaves no base to share.
        alone = str(self.weights) if method["trains"] == "all" and self.weights else None
        parts = [alone, model["path"], model["revision"], model["dtype"], model["add_tokens"], stored, self.whole]
        return json.dumps(parts)


def find(words: Sequence[str], defaults: Mapping[str, Any]) -> list[Named]:
    """Find every word; ``base`` is the base of the first run among them, or that of ``defaults``.

    Args:
        words: What ``ckpt=`` was given.
        defaults: ``model``, ``method`` and ``data`` for what no run describes.

    Raises:
        CheckpointError: A word names nothing that can be evaluated.
        UnsafeArtifact: A run's own config asks for code of a model's repository, which nobody typed.
    """
    found = [None if word == BASE else _find(word, defaults) for word in words]
    _refuse_unasked_code(found, defaults)
    owner = next((named for named in found if named is not None and (named.run or not named.whole)), None)
    # Of a run that trained every weight, its own model stands under the adapter's folder; the base is what it started from.
    cfg = defaults if owner is None else owner.cfg if owner.run is None else _read_config(owner.run)
    run = None if owner is None else owner.run
    named = [Named(BASE, cfg, None, run) if one is None else one for one in found]
    return _distinct(named)


def _refuse_unasked_code(found: Sequence[Named | None], defaults: Mapping[str, Any]) -> None:
    """Let a run's folder, which may come from anywhere, run nothing: the user says so each time."""
    for named in found:
        model = {} if named is None or named.run is None else named.cfg["model"]
        if model.get("trust_remote_code") and not defaults["model"]["trust_remote_code"]:
            raise UnsafeArtifact(
                f"ckpt={named.label if named else BASE}: its config.yaml asks to run code from the repository of "
                f"{model['path']} (revision {model['revision']}). Read that code, then pass model.trust_remote_code=true."
            )


def _find(word: str, defaults: Mapping[str, Any]) -> Named:
    folder = Path(word).expanduser()
    folder = Path(os.path.abspath(folder))
    label = _label(folder.name)
    if (folder / "config.yaml").is_file():
        return _of_run(folder, label)
    if (folder / checkpoints.ADAPTER_FILE).is_file() and (folder.parents[1] / "config.yaml").is_file():
        checkpoints.verify(folder)
        run = folder.parents[1]
        label = _label(f"{run.name}-{folder.name}")
        return Named(label, _read_config(run), folder / checkpoints.ADAPTER_FILE, run, place=run)
    if (folder / "adapter_config.json").is_file():
        return _of_adapter(folder, label, defaults)
    if (folder / "config.json").is_file() or (not folder.parent.is_dir() and HUB_ID.fullmatch(word)):
        model = {**defaults["model"], "path": word, "revision": defaults["model"].get("revision")}
        typed = defaults.get("typed_text", ())
        # A typed template ends its turns in its own way.
        own = {} if "chat_template" in typed else own_template(folder)
        model |= {key: value for key, value in own.items() if key not in typed}
        return Named(label, {**defaults, "model": model}, None, None, whole=True, place=folder)
    raise CheckpointError(
        f"ckpt={word}: neither a run, a checkpoint of one, a PEFT adapter folder nor a model. Pass one of these, or base."
    )


def _of_run(folder: Path, label: str) -> Named:
    cfg = _read_config(folder)
    if (folder / "adapter" / "config.json").is_file():
        cfg["model"] |= {"path": str(folder / "adapter"), "revision": None}
        return Named(label, cfg, None, folder, whole=True, place=folder)
    if (folder / "adapter" / "adapter_model.safetensors").is_file():
        return Named(label, cfg, folder / "adapter" / "adapter_model.safetensors", folder, place=folder)
    newest, _ = checkpoints.latest(folder / "checkpoints")
    if newest is None:
        raise CheckpointError(f"ckpt={folder}: this run has no adapter and no checkpoint yet. Resume it first.")
    return Named(label, cfg, newest.folder / checkpoints.ADAPTER_FILE, folder, place=folder)


def _of_adapter(folder: Path, label: str, defaults: Mapping[str, Any]) -> Named:
    """Take an adapter folder: one of ours knows its run, a foreign one its base and its shape."""
    if (folder.parent / "config.yaml").is_file():
        run = folder.parent
        label = _label(f"{run.name}-{folder.name}")
        return Named(label, _read_config(run), find_adapter_file(folder, key="ckpt"), run, place=run)
    settings = read_settings(folder / "adapter_config.json", key="ckpt")
    model = dict(defaults["model"])
    if defaults.get("model_is_default", True) and settings.get("base_model_name_or_path"):
        model |= {"path": settings["base_model_name_or_path"], "revision": settings.get("revision")}
    return Named(label, {**defaults, "model": model}, find_adapter_file(folder, key="ckpt"), None, place=folder)


def _read_config(run: Path) -> dict[str, Any]:
    try:
        found = safe_load.yaml_text((run / "config.yaml").read_text(encoding="utf-8"))
        return {key: dict(found[key]) for key in ("model", "method", "data", "objective")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{run}: its config.yaml cannot be read ({type(error).__name__}).") from error


def _label(name: str) -> str:
    # The end of a long name tells more: a step, a hash, a number.
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[-64:].strip(".-") or "checkpoint"


def _distinct(named: list[Named]) -> list[Named]:
    """Put the names of parent folders before labels that are the same, until none is.

    Raises:
        ConfigError: Two words name the same checkpoint.
    """
    asked = [(one.label, one.place) for one in named]
    if len(set(asked)) < len(asked):
        twice = next(place or label for label, place in asked if asked.count((label, place)) > 1)
        raise ConfigError(f"ckpt: two of them are {twice}. Leave one out.")
    above = [list(one.place.parts[:-1]) if one.place else [] for one in named]
    while same := _same([one.label for one in named]):
        higher = any(above[i] for i in same)
        for i in same:
            if above[i]:
                named[i] = replace(named[i], label=_label(f"{above[i].pop()}-{named[i].label}"))
            elif not higher:
                # The names differ only in what a label cannot hold.
                named[i] = replace(named[i], label=_label(f"{named[i].label}-{i + 1}"))
    return named


def _same(labels: list[str]) -> list[int]:
    """Return the places of labels that would be one folder, also where capitals do not count."""
    folded = [label.casefold() for label in labels]
    return [i for i, label in enumerate(folded) if folded.count(label) > 1]


def spec_of(named: Named, tokenizer: PreTrainedTokenizerBase) -> AdapterSpec:
    """Return the shape and scaling of a checkpoint's adapter: its own words, else those of its run."""
    if named.weights is not None and (named.weights.parent / "adapter_config.json").is_file():
        return spec_of_folder(named.weights.parent)
    return assembly.adapter_spec(named.cfg, tokenizer)


def _text_key(model: Mapping[str, Any]) -> str:
    """Name everything that decides a folder's tokenizer and chat template."""
    return json.dumps([model[key] for key in TEXT_KEYS])


class Stage:
    """One loaded base on which checkpoints take turns.

    Args:
        named: The first of the checkpoints that share this base.
        plan: Device and precision.
    """

    def __init__(self, named: Named, plan: DevicePlan) -> None:
        model = named.cfg["model"]
        self.folder = resolve_model(
            model["path"], revision=model["revision"], trust_remote_code=model["trust_remote_code"]
        )
        self.plan, self.whole = plan, named.whole
        self.fingerprint = base_fingerprint(self.folder)
        self._templates: dict[str, ChatTemplate] = {}
        self.tokenizer, self._templates[_text_key(model)] = assembly.load_text(model, self.folder)
        self.network: nn.Module = self._load(named)
        self._spec: AdapterSpec | None = None

    def _load(self, named: Named) -> nn.Module:
        if named.whole:
            own = safe_load.json_object(self.folder / "config.json")
            name = own.get("dtype") or own.get("torch_dtype") or "float32"
            dtype: torch.dtype = getattr(torch, name)
            return load_base(BaseSpec(self.folder, 16, dtype, dtype, self.plan.device))
        return assembly.load_bare(named.cfg, self.folder, self.tokenizer, self.plan)

    def _template(self, model: Mapping[str, Any]) -> ChatTemplate:
        """Return the template of a checkpoint; to load it takes a tokenizer, which takes seconds for a large vocabulary."""
        key = _text_key(model)
        if key not in self._templates:
            _, self._templates[key] = assembly.load_text(model, self.folder)
        return self._templates[key]

    def show(self, named: Named) -> Subject:
        """Put a checkpoint's adapter on the base and return what is to be evaluated.

        Raises:
            CheckpointError: Its adapter belongs to another base.
        """
        template = self._template(named.cfg["model"])
        if named.weights is not None:
            check_adapter(named.weights.parent, self.fingerprint, key="ckpt")
            spec = spec_of(named, self.tokenizer)
            if not isinstance(self.network, PeftModel) or spec != self._spec:
                self.network = replace_adapter(self.network, spec)
                self._spec = spec
            load_trained_state(self.network, safe_load.tensors(named.weights), origin=str(named.weights))
        if self.plan.device.type == "cuda":
            # Long passes, such as scoring makes, are faster so.
            fuse(self.network)
            fuse_frozen(self.network)
        precision = torch.float32 if self.whole else self.plan.compute_dtype
        base = named.weights is None and isinstance(self.network, PeftModel)
        return Subject(self.network, self.tokenizer, template, self.plan.device, precision, base)

    def identity(self, named: Named) -> dict[str, Any]:
        """Name everything about a checkpoint that decides its answers."""
        return {
            "base": self.fingerprint,
            "adapter": None if named.weights is None else [sha256(named.weights), str(self._spec)],
            "method": {key: named.cfg["method"][key] for key in ("bits", "quant_type", "double_quant", "alpha", "rank")},
            "model": {key: named.cfg["model"][key] for key in ("dtype", "add_tokens", "chat_template", "end_of_turn")},
            "whole": named.whole,
            "device": self.plan.describe(),
            "precision": [self.plan.precision, str(self.plan.compute_dtype)],
        }
