"""Folders that adapters come from: where their weights are, which base they belong to, and whether ours can be like them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import LoraConfig

from fine_tune import safe_load
from fine_tune.errors import CheckpointError, UnsafeArtifact
from fine_tune.storage import sha256

IDENTITY_FILE = "fine_tune.json"
PEFT_CONFIG = "adapter_config.json"
# In the identity file: of the weights beside it.
WEIGHTS_HASH = "weights_sha256"
# Settings that ours has too, that say nothing about the weights, or that the names of the tensors decide.
SEEN_ELSEWHERE = {
    "r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "exclude_modules", "trainable_token_indices",
    "layers_pattern", "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "lora_dropout", "fan_in_fan_out", "megatron_core", "eva_config", "corda_config", "lora_ga_config",
    "loftq_config", "init_lora_weights",
}  # fmt: skip
# First values that leave the base's weights alone; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract from them.
HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


def find_adapter(folder: Path, *, key: str) -> tuple[Path, Path]:
    """Return the weights of a run, checkpoint or PEFT folder, and the file that may name their base.

    Args:
        folder: A run, a checkpoint in one, or a PEFT adapter folder.
        key: What the config calls the folder, for messages.

    Raises:
        CheckpointError: There is no adapter.
        UnsafeArtifact: Its weights are a pickle file, or a link leads out of its folder.
    """
    for place, weights, identity in (
        (folder / "adapter", "adapter_model.safetensors", IDENTITY_FILE),
        (folder, "adapter_model.safetensors", IDENTITY_FILE),
        (folder, "adapter.safetensors", "manifest.json"),
    ):
        if (place / weights).is_file():
            safe_load.refuse_foreign_links(place, key=key)
            return place / weights, place / identity
    if (folder / "adapter" / "model.safetensors").is_file():
        whole = folder / "adapter"
        raise CheckpointError(f"{key}={folder}: every weight was trained there, no adapter. Pass model.path={whole}.")
    if (folder / "adapter_model.bin").is_file():
        raise UnsafeArtifact(f"{key}={folder}: adapter_model.bin is a pickle file. Convert it to safetensors first.")
    raise CheckpointError(f"{key}={folder}: {_what_is_missing(folder)}")


def _what_is_missing(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder. Pass a run, a checkpoint or a PEFT adapter folder."
    # A checkpoint's manifest is its last file: without it the folder is half written or half deleted.
    steps = {int(file.parent.name[5:]): file.parent for file in folder.glob("checkpoints/step-[0-9]*/manifest.json")}
    if steps:
        return f"this run has no adapter yet. Pass its newest checkpoint, {steps[max(steps)]}, or resume the run first."
    return "no adapter there. Pass a run, a checkpoint or a PEFT adapter folder."


def read_settings(file: Path, *, key: str) -> dict[str, Any]:
    """Read a file of settings beside an adapter's weights.

    Raises:
        CheckpointError: It is damaged.
    """
    try:
        return safe_load.json_object(file)
    except safe_load.Unreadable as error:
        raise CheckpointError(f"{key}: {file} is damaged ({error}). Restore it, or use another adapter.") from error


def check_base(folder: Path, identity: Path, base_fingerprint: str, *, key: str) -> str | None:
    """Compare the base that an adapter names with this one; return a warning where it names none.

    Raises:
        CheckpointError: It is another base, or the weights are damaged.
    """
    if not identity.is_file():
        return f"{key}={folder}: a foreign PEFT adapter with no record of its base; shapes fit, the rest is not checked."
    known = read_settings(identity, key=key)
    _check_weights(identity.parent, known, key=key)
    recorded = known.get("base_fingerprint")
    if recorded != base_fingerprint:
        raise CheckpointError(
            f"{key}={folder}: it belongs to another base model (fingerprint {str(recorded)[:12]}, this base has "
            f"{base_fingerprint[:12]}). Set model= to the base it was trained on."
        )
    return None


def _check_weights(place: Path, known: dict[str, Any], *, key: str) -> None:
    """Refuse weights that are not those of which the file beside them speaks, such as after a bit of them has flipped."""
    recorded = {"adapter_model.safetensors": known.get(WEIGHTS_HASH)}
    files = known.get("files")
    if isinstance(files, dict):
        recorded |= {name: entry.get("sha256") for name, entry in files.items() if isinstance(entry, dict)}
    for name, digest in recorded.items():
        file = place / name
        if digest is not None and file.is_file() and sha256(file) != digest:
            raise CheckpointError(f"{key}: the content of {file} is not what was saved. Use another checkpoint, or a copy of it.")


def check_settings(folder: Path, place: Path, *, key: str) -> None:
    """Refuse an adapter that computes something else with its weights than an adapter of ours would.

    Args:
        folder: What the config names.
        place: The folder of the weights.
        key: What the config calls it, for messages.

    Raises:
        CheckpointError: It has settings that ours do not have; they are named.
    """
    file = place / PEFT_CONFIG
    found = read_settings(file, key=key) if file.is_file() else {}
    kind = found.get("peft_type", "LORA")
    if kind != "LORA":
        raise CheckpointError(f"{key}={folder}: a PEFT adapter of type {kind}. Only LoRA adapters can be taken.")
    foreign = [f"{name}={json.dumps(value)}" for name, value in found.items() if not _is_like_ours(name, value)]
    if foreign:
        raise CheckpointError(
            f"{key}={folder}: {', '.join(foreign)} in its {PEFT_CONFIG}: adapters here do not have that, so its weights would "
            "mean something else. Merge it into its base with PEFT and pass the result as model.path, or use another adapter."
        )


def _is_like_ours(name: str, value: Any) -> bool:
    if name == "init_lora_weights":
        return value in HARMLESS_STARTS
    if name in SEEN_ELSEWHERE or not value:
        return True
    defaults = LoraConfig().to_dict()
    # A number that this PEFT does not know is the size of something that another setting switches on.
    unknown_size = name not in defaults and isinstance(value, int | float) and not isinstance(value, bool)
    return unknown_size or bool(value == defaults.get(name))
