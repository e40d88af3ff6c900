"""From a model's name to a local folder: packaged, on disk, or a pinned revision of a hub repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fine_tune.errors import ConfigError, EnvironmentProblem, UnsafeArtifact

BUILTIN = {"builtin:tiny": Path(__file__).parent.parent / "world" / "base"}
TEXT = ["*.json", "*.model", "*.txt", "*.jinja"]
WANTED = ["*.safetensors", "*.safetensors.index.json", *TEXT]


def resolve_model(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """Return the folder that holds the model's files, downloading a hub revision when it is not there yet.

    Raises:
        ConfigError: A local path that does not exist.
        EnvironmentProblem: The hub refuses or cannot be reached; one sentence says what to do.
        UnsafeArtifact: The repository wants to run its own code and ``trust_remote_code`` is off.
    """
    folder = _local(path)
    if folder is None:
        folder = _download(path, revision, [*WANTED, "*.py"] if trust_remote_code else WANTED)
    if not trust_remote_code:
        _refuse_code(folder, "config.json", "tokenizer_config.json")
    return folder


def resolve_text(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """Return a folder that holds a model's tokenizer: no weights are fetched, and a local one needs no config.

    Raises:
        ConfigError: A local path that does not exist.
        EnvironmentProblem: As ``resolve_model``.
        UnsafeArtifact: The tokenizer wants to run its repository's code and ``trust_remote_code`` is off.
    """
    folder = _local(path, needs_config=False)
    if folder is None:
        folder = _download(path, revision, [*TEXT, "*.py"] if trust_remote_code else TEXT)
    if not trust_remote_code:
        _refuse_code(folder, "tokenizer_config.json")
    return folder


def _local(path: str, *, needs_config: bool = True) -> Path | None:
    if path in BUILTIN:
        return BUILTIN[path]
    folder = Path(path).expanduser()
    if folder.is_dir():
        if needs_config and not (folder / "config.json").is_file():
            raise ConfigError(f"model.path={path}: the folder has no config.json. Pass a model folder or a hub id.")
        return folder
    if path.startswith(("builtin:", "/", ".", "~")) or path.count("/") != 1:
        raise ConfigError(f"model.path={path}: no such folder, and a hub id looks like owner/name.")
    return None


def _download(repository: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise EnvironmentProblem(
            f"{repository} is gated: accept its licence at huggingface.co/{repository} and log in with `hf auth login` "
            "(or set HF_TOKEN), or pass model.path=<local folder>."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise EnvironmentProblem(
            f"{repository} was not found on the hub, or it is private: check model.path, log in with `hf auth login`, "
            "or pass model.path=<local folder>."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise EnvironmentProblem(f"{repository} has no revision {revision}: set model.revision.") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise EnvironmentProblem(
            f"{repository}@{revision} is not in the local cache and the hub cannot be reached "
            f"({type(error).__name__}): go online once (unset HF_HUB_OFFLINE), or pass model.path=<local folder>."
        ) from error


def _refuse_code(folder: Path, *names: str) -> None:
    for name in names:
        file = folder / name
        if file.is_file() and needs_own_code(_read_json(file)):
            raise UnsafeArtifact(
                f"{file.name} of {folder} asks to run code from the model's repository (auto_map). Read that code, then "
                "set model.trust_remote_code=true with a pinned model.revision, or choose another model."
            )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise EnvironmentProblem(f"{file}: damaged ({error}). Fetch the model again.") from error


def context_length(folder: Path) -> int | None:
    """Return the positions a model was made for, in tokens, None where its config does not say."""
    config = _read_json(folder / "config.json")
    found = config.get("max_position_embeddings") or (config.get("text_config") or {}).get("max_position_embeddings")
    return int(found) if found else None


def needs_own_code(config: dict[str, Any]) -> bool:
    """Tell whether a config only loads through its repository's own Python: it has an ``auto_map`` and no native class."""
    if not config.get("auto_map"):
        return False
    from transformers import CONFIG_MAPPING

    return config.get("model_type") not in CONFIG_MAPPING
