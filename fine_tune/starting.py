"""Where a run's adapter starts: fresh, from an earlier one, or from the run's own checkpoint; and what its reference is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from fine_tune import safe_load
from fine_tune.checkpoints import Checkpoint
from fine_tune.errors import CheckpointError
from fine_tune.models.adapter import adapter_record, check_adapter, load_initial_adapter, load_trained_state, trainable
from fine_tune.modules.reference import FrozenAdapter, fingerprint, snapshot
from fine_tune.opening import say
from fine_tune.storage import write_bytes

INITIAL, BASE = "initial", "base"
REFERENCE = "objective.reference"
REFERENCE_FILE = Path("reference") / "values.safetensors"


def check_sources(cfg: Mapping[str, Any], base_fingerprint: str, *, template_hash: str | None) -> None:
    """Refuse an adapter to start from, or a reference, that is not there or belongs to another base.

    One that was trained under another chat template is taken, with a note: its prompts looked otherwise. None: the template
    is not known.

    Raises:
        CheckpointError: It is not there, or was trained on another base.
    """
    reference = cfg["objective"].get("reference")
    named = {"init_from": cfg["init_from"], REFERENCE: None if reference in (None, INITIAL, BASE) else reference}
    for key, source in named.items():
        if source is not None:
            folder = Path(source).expanduser()
            check_adapter(folder, base_fingerprint, key=key)
            earlier = adapter_record(folder, key=key)
            if template_hash is not None and earlier.get("template_hash", template_hash) != template_hash:
                say(
                    f"note: {source} was trained with the chat template {earlier.get('chat_template')}, and this run uses "
                    "another: it meets prompts it has never seen. Set model.chat_template to continue in its form."
                )


def start(
    cfg: Mapping[str, Any], network: nn.Module, record: dict[str, Any], *, folder: Path, checkpoint: Checkpoint | None
) -> FrozenAdapter | None:
    """Put the first values into a freshly adapted network and return the reference that the objective asks for.

    Args:
        cfg: The config.
        network: The model as ``method`` made it, its adapter fresh.
        record: Fingerprints of this run; that of the reference is added.
        folder: The run's folder, where a reference that cannot be made again is kept.
        checkpoint: The checkpoint to go on from.

    Raises:
        CheckpointError: An adapter belongs to another base, or something changed since the checkpoint was written.
    """
    # Only rank 0 has the run's folder as its own; a resumed run's is where its checkpoint is, on every rank.
    home = folder if checkpoint is None else checkpoint.folder.parents[1]
    values = _reference(cfg, network, record["base_fingerprint"], folder=home, resumed=checkpoint is not None)
    if values is not None and checkpoint is None:
        _say_what_is_unusual(cfg)
    if values is not None:
        record["reference_fingerprint"] = fingerprint(values)
    if checkpoint is not None:
        refuse_changes(checkpoint, record)
        load_trained_state(network, checkpoint.adapter(), origin=str(checkpoint.folder))
    elif cfg["init_from"]:
        _load(network, cfg["init_from"], record["base_fingerprint"])
    return None if values is None else FrozenAdapter(network, values)


def _say_what_is_unusual(cfg: Mapping[str, Any]) -> None:
    if cfg["objective"]["reference"] == INITIAL and not cfg["init_from"]:
        say(
            "note: no init_from=, so rewards are measured from the raw base. After supervised fine-tuning, pass "
            "init_from=<that run>: its adapter is then the start and the reference."
        )
    if cfg["objective"].get("allow_other_start"):
        say("note: objective.allow_other_start=true: step 0 is not checked for zero margins.")


def _reference(
    cfg: Mapping[str, Any], network: nn.Module, base_fingerprint: str, *, folder: Path, resumed: bool
) -> dict[str, Tensor] | None:
    """Take the reference's values and leave the network as it was."""
    name = cfg["objective"].get("reference")
    if name is None:
        return None
    source = cfg["init_from"] if name == INITIAL else None if name == BASE else name
    fresh = snapshot(network)
    if source is None:
        # A fresh adapter adds nothing to the base, and the seed makes the same one again when the run is resumed.
        return fresh
    file = folder / REFERENCE_FILE
    if resumed:
        return _read(file)
    _load(network, source, base_fingerprint, key="init_from" if name == INITIAL else REFERENCE)
    values = snapshot(network)
    _restore(network, fresh)
    # Kept with the run: what it came from may be trained on, moved or deleted before the run is resumed.
    write_bytes(file, save({key: value.cpu() for key, value in values.items()}))
    return values


def _load(network: nn.Module, source: str, base_fingerprint: str, *, key: str = "init_from") -> None:
    warning = load_initial_adapter(network, Path(source).expanduser(), base_fingerprint, key=key)
    if warning:
        say(f"note: {warning}")


def _restore(network: nn.Module, values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in trainable(network).items():
            parameter.copy_(values[name])


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return safe_load.tensors(file)
    except CheckpointError as error:
        raise CheckpointError(
            f"{file}: the run's reference is missing or damaged. Start a new run with init_from=."
        ) from error


def refuse_changes(checkpoint: Checkpoint, record: Mapping[str, Any]) -> None:
    """Compare every fingerprint with the one that the checkpoint was written under.

    Raises:
        CheckpointError: Some differ; they are named.
    """
    written = checkpoint.manifest
    changed = [key for key in record if key != "scaling" and written.get(key) not in (None, record[key])]
    if changed:
        raise CheckpointError(
            f"{checkpoint.folder}: {', '.join(changed)} changed since it was written (base "
            f"{str(written.get('base_fingerprint'))[:12]}); resuming would not continue the same run. Restore what changed, or "
            "start a new run with init_from=."
        )
