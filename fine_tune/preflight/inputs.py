"""What a run reads: model folder, tokenizer, template, adapters and rows, each checked before a weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fine_tune import assembly
from fine_tune.checkpoints import Checkpoint
from fine_tune.data.collect import collect
from fine_tune.data.ledger import Ledger
from fine_tune.data.module import PackedDataModule
from fine_tune.data.spec import PrepareSpec
from fine_tune.errors import ConfigError
from fine_tune.models.fingerprint import base_fingerprint
from fine_tune.models.hub import context_length, is_here, resolve_model
from fine_tune.preflight.findings import Findings
from fine_tune.starting import check_sources, refuse_changes
from fine_tune.text.template import ChatTemplate
from fine_tune.text.tokenizer import tokenizer_fingerprint
from fine_tune.training_data import prepared_data


@dataclass(frozen=True)
class Inputs:
    """What the checks have opened.

    Attributes:
        folder: The model's files.
        tokenizer: Its tokenizer, new tokens included.
        template: The chat template.
        data: The prepared rows; steps are not planned yet.
        record: Fingerprints of all of these, as manifests hold them.
    """

    folder: Path
    tokenizer: Any
    template: ChatTemplate
    data: PackedDataModule
    record: dict[str, Any]


def open_inputs(cfg: Mapping[str, Any], findings: Findings, *, checkpoint: Checkpoint | None) -> Inputs | None:
    """Open and check everything that a run reads; None where something is refused.

    Once something is refused, what is here is still looked at, and nothing is fetched or tokenized for a run that cannot be.

    Args:
        cfg: A checked config.
        findings: Takes what is refused.
        checkpoint: The checkpoint to go on from, None for a new run.
    """
    folder = identity = text = data = None
    model = cfg["model"]
    with findings.of("model"):
        if not findings.problems or is_here(model["path"]):
            folder = resolve_model(model["path"], revision=model["revision"], trust_remote_code=model["trust_remote_code"])
            identity = base_fingerprint(folder)
    with findings.of("context"):
        if folder is not None:
            _refuse_long(cfg["data"]["max_seq_len"], folder)
    with findings.of("tokenizer and template"):
        text = None if folder is None else assembly.load_text(model, folder)
    with findings.of("data"):
        if text is None or findings.problems:
            _read_rows(assembly.prepare_spec(cfg))
        else:
            data = prepared_data(cfg, *text)
    record: dict[str, Any] = {"base_fingerprint": identity}
    if text is not None:
        tokenizer, template = text
        record["tokenizer_fingerprint"] = tokenizer_fingerprint(tokenizer)
        record |= {"chat_template": template.name, "template_hash": template.sha256}
    if data is not None:
        record["data_fingerprint"] = data.prepared.fingerprint
    with findings.of("adapters" if checkpoint is None else "checkpoint"):
        if checkpoint is not None:
            refuse_changes(checkpoint, {key: value for key, value in record.items() if value is not None})
        elif identity is not None:
            check_sources(cfg, identity, template_hash=record.get("template_hash"))
    if folder is None or text is None or data is None:
        return None
    return Inputs(folder, *text, data, record)


def _read_rows(spec: PrepareSpec) -> None:
    """Read the rows that are here, for what is wrong with them without a tokenizer."""
    if not any(source.hub for source in spec.source_specs().values()):
        collect(spec, Ledger(max_seq_len=spec.max_seq_len))


def _refuse_long(longest: int, folder: Path) -> None:
    positions = context_length(folder)
    if positions is not None and longest > positions:
        raise ConfigError(
            f"data.max_seq_len={longest}: the model was made for {positions} tokens. Lower it to that or less."
        )
