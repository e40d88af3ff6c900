"""From a model's name to a local folder: packaged, on disk, or a pinned revision of a hub repository."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fine_tune import safe_load
from fine_tune.errors import ConfigError, EnvironmentProblem, UnsafeArtifact

BUILTIN = {"builtin:tiny": Path(__file__).parent.parent / "world" / "base"}
TEXT = ["*.json", "*.model", "*.txt", "*.jinja"]
WANTED = ["*.safetensors", "*.safetensors.index.json", *TEXT]
ADAPTER = "adapter_config.json"
# What a hub may take to say its first word.
PROBE_SECONDS = 5.0
COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve_model(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """Return the folder that holds the model's files, downloading a hub revision when it is not there yet.

    Raises:
        ConfigError: A local path that does not exist, an adapter's folder, or code of the hub without a pinned commit.
        EnvironmentProblem: The hub refuses or cannot be reached; one sentence says what to do.
        UnsafeArtifact: The repository wants to run its own code and ``trust_remote_code`` is off.
    """
    folder = _local(path)
    if folder is None:
        _refuse_unpinned(path, revision, trusted=trust_remote_code)
        folder = _download(path, revision, [*WANTED, "*.py"] if trust_remote_code else WANTED)
    if (folder / ADAPTER).is_file():
        # transformers would load the base that it names, put the adapter on it, and say nothing.
        raise ConfigError(
            f"model.path={path}: an adapter lies in that folder ({ADAPTER}). Pass its base as model.path and the adapter as "
            f"init_from= or ckpt=, or remove {ADAPTER} if the weights are those of a whole model."
        )
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
        _refuse_unpinned(path, revision, trusted=trust_remote_code)
        folder = _download(path, revision, [*TEXT, "*.py"] if trust_remote_code else TEXT)
    if not trust_remote_code:
        _refuse_code(folder, "tokenizer_config.json")
    return folder


def is_here(path: str) -> bool:
    """Tell whether a model's name is that of something on this machine, and no id of the hub.

    Raises:
        ConfigError: It can be neither.
    """
    return _local(path) is not None


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

    known: dict[str, Any] = {} if _answers(repository, revision) else {"local_files_only": True}
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, **known))
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
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError, _lost()) as error:
        raise EnvironmentProblem(
            f"{repository}@{revision} is not in the local cache and the hub cannot be reached "
            f"({type(error).__name__}): go online once (unset HF_HUB_OFFLINE), or pass model.path=<local folder>."
        ) from error


def _answers(repository: str, revision: str | None) -> bool:
    """Tell whether the hub says anything at all within seconds; its client would go on asking for minutes."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if constants.HF_HUB_OFFLINE:
        return True  # nobody is asked
    try:
        HfApi().model_info(repository, revision=revision, timeout=PROBE_SECONDS)
    except (HfHubHTTPError, HFValidationError):
        return True  # what is wrong, the download tells
    except (OSError, ValueError, _lost()):
        # Nothing answers, or something else does: a login page of the network's is no JSON (ValueError).
        return False
    return True


def _lost() -> type[Exception]:
    """Return the base class of what the transport of the hub's client raises: the client knows which one it uses."""
    from huggingface_hub import errors

    found: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    return found


def _refuse_unpinned(path: str, revision: str | None, *, trusted: bool) -> None:
    """Run code of the hub only from the commit that somebody has read."""
    if trusted and not COMMIT.fullmatch(revision or ""):
        raise ConfigError(
            f"model.trust_remote_code=true: code of {path} is only run from a pinned commit. Pass model.revision=<40 hex digits>."
        )


def _refuse_code(folder: Path, *names: str) -> None:
    for name in names:
        file = folder / name
        config = _read_json(file) if file.is_file() else {}
        asked = ["auto_map"] if needs_own_code(config) else []
        if asked := [*asked, *kernels_from_elsewhere(config)]:
            raise UnsafeArtifact(
                f"{file.name} of {folder} asks to run code from a repository of the hub ({asked[0]}). Read that code, then "
                "set model.trust_remote_code=true with a pinned model.revision, or choose another model."
            )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return safe_load.json_object(file)
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


def kernels_from_elsewhere(config: Any, key: str = "") -> Iterator[str]:
    """Yield the settings of a config that make transformers fetch and run a kernel's repository, ``owner/name``."""
    for name, value in config.items() if isinstance(config, dict) else ():
        place = f"{key}.{name}" if key else str(name)
        if name.endswith("_implementation") and "/" in str(value):
            yield f"{place}={value}"
        else:
            yield from kernels_from_elsewhere(value, place)
