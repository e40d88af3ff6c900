"""The exact folder that is pushed: files that belong to the artifact, and none of the run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fine_tune.errors import CheckpointError, UnsafeArtifact
from fine_tune.pushing.inert import short_name
from fine_tune.redaction import SECRET_VALUES
from fine_tune.storage import write_json

TEXT = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")
LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "fine_tune.json", "passport.json", *TEXT, *LEGAL)
MODEL = (
    "model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "passport.json",
    "merge_report.json", "fine_tune.json", *TEXT, *LEGAL,
)  # fmt: skip
# Files in which the base is named as it was typed, perhaps a folder of somebody's.
NAMING = {"adapter_config.json": "base_model_name_or_path", "fine_tune.json": "model"}


def gather(source: Path, place: Path, card: str, *, patterns: Sequence[str]) -> list[Path]:
    """Fill an empty folder with an artifact and its card, and return the files.

    Args:
        source: The adapter's or merged model's folder.
        place: An existing, empty folder.
        card: Text of README.md.
        patterns: Names of files that belong to the artifact.

    Raises:
        CheckpointError: The weights are not there.
        UnsafeArtifact: A file holds what looks like a secret.
    """
    names = sorted(
        file.name
        for file in source.iterdir()
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in patterns)
    )
    if not any(name.endswith(".safetensors") for name in names):
        raise CheckpointError(f"{source} holds no weights to push. Finish the run, or merge it first.")
    for name in names:
        file = source / name
        if name in NAMING:
            _write_named(file, place / name, NAMING[name])
        elif not name.endswith(".safetensors"):
            shutil.copyfile(file, place / name)
        else:
            _link(file, place / name)
    (place / "README.md").write_text(card, encoding="utf-8")
    refuse_secrets(place)
    return sorted(place.iterdir())


def _write_named(file: Path, to: Path, key: str) -> None:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(found.get(key), str):
        found[key] = short_name(found[key])
    write_json(to, found)


def _link(file: Path, to: Path) -> None:
    """Weights take no second place on the disk where the file system can share them."""
    try:
        os.link(file.resolve(), to)
    except OSError:
        shutil.copyfile(file, to)


def refuse_secrets(folder: Path) -> None:
    """Look through every file that people can read.

    Raises:
        UnsafeArtifact: One holds what looks like a key, a token or a password in an address.
    """
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors" or file.name in (
            "tokenizer.json",
            "tokenizer.model",
            "vocab.json",
            "merges.txt",
        ):
            # Vocabularies hold anything; weights are no text.
            continue
        if SECRET_VALUES.search(file.read_text(encoding="utf-8", errors="replace")):
            raise UnsafeArtifact(
                f"{file.name} holds what looks like a secret; nothing was pushed. Remove it and push again."
            )
