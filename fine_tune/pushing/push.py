"""Push an adapter or a merged model to the hub, with a card; a dry run writes the same folder and stops there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fine_tune.errors import CheckpointError, ConfigError, EnvironmentProblem
from fine_tune.models.hub import BUILTIN
from fine_tune.pushing.artifact import ADAPTER, MODEL, gather
from fine_tune.pushing.card import card
from fine_tune.pushing.facts import read_facts
from fine_tune.pushing.licence import licence_of
from fine_tune.storage import new_folder

REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True)
class PushSettings:
    """The words of a push.

    Attributes:
        ckpt: The run.
        repo: The hub id.
        what: ``adapter`` or ``merged``.
        merged: The merged folder, None for ``merged`` in the run.
        out: Where the pushed folder is written, None for ``push/<what>`` in the run.
        licence: The hub's name of the base's licence, None to find it.
        dry_run: Stop before the hub is asked.
        private: Of a repository that does not exist yet.
    """

    ckpt: Path
    repo: str
    what: str = "adapter"
    merged: Path | None = None
    out: Path | None = None
    licence: str | None = None
    dry_run: bool = False
    private: bool = True


def push(settings: PushSettings) -> tuple[list[Path], str | None]:
    """Write the folder, and push it unless it is a dry run; return its files and the address.

    Raises:
        ConfigError: ``repo`` is no hub id, or ``out`` holds something else.
        CheckpointError: There is nothing to push.
        EnvironmentProblem: The hub cannot be reached, or refuses.
        UnsafeArtifact: A file holds a secret.
    """
    if not REPO.fullmatch(settings.repo) or ".." in settings.repo or "--" in settings.repo:
        raise ConfigError(f"repo={settings.repo}: a hub id looks like owner/name.")
    if not settings.dry_run:
        refuse_offline()
    run, source = _find(settings)
    out = settings.out or run / "push" / settings.what
    if out.exists() and any(out.iterdir()) and not (out / "README.md").is_file():
        raise ConfigError(f"out={out}: exists and was not written by push. Choose another folder.")
    is_merged = settings.what == "merged"
    facts = read_facts(run, source if is_merged else None)
    if is_merged and facts.merge.get("within_tolerance") is not True and (source / "merge_report.json").is_file():
        raise CheckpointError(f"{source}: its merge report does not say that it is sound. Merge it again.")
    path = str(facts.part("model").get("path"))
    folder = BUILTIN.get(path) or (Path(path).expanduser() if Path(path).expanduser().is_dir() else None)
    licence = settings.licence or licence_of(path, folder)
    # A model whose every weight was trained is a model, wherever it lies.
    whole = is_merged or (source / "config.json").is_file()
    text = card(facts, repo=settings.repo, merged=whole, licence=licence)
    with new_folder(out) as place:
        names = [file.name for file in gather(source, place, text, patterns=MODEL if whole else ADAPTER)]
    address = None if settings.dry_run else upload(out, settings.repo, private=settings.private)
    return [out / name for name in names], address


def _find(settings: PushSettings) -> tuple[Path, Path]:
    run = settings.ckpt
    if run.name == "adapter" and (run.parent / "config.yaml").is_file():
        run = run.parent
    source = run / "adapter" if settings.what == "adapter" else settings.merged or run / "merged"
    if not (run / "config.yaml").is_file() or not source.is_dir():
        hint = (
            "Finish the run first."
            if settings.what == "adapter"
            else "Make it with fine-tune merge, or pass merged=<folder>."
        )
        raise CheckpointError(f"ckpt={settings.ckpt}: no {settings.what} model of a run there ({source}). {hint}")
    return run, source


def refuse_offline() -> None:
    """Tell, before anything is written, that the hub may not be asked.

    Raises:
        EnvironmentProblem: The session is offline, or there is no token.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise EnvironmentProblem("HF_HUB_OFFLINE is set: nothing is pushed. Unset it, or pass dry_run=true.")
    if not get_token():
        raise EnvironmentProblem("no hub token: log in with `hf auth login` or set HF_TOKEN, or pass dry_run=true.")


def upload(folder: Path, repo: str, *, private: bool) -> str:
    """Create the repository if it is not there, and upload the folder as one commit.

    Raises:
        EnvironmentProblem: The hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message="Upload with fine-tune")
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [""]
        raise EnvironmentProblem(
            f"repo={repo}: not pushed ({type(error).__name__}: {lines[0]}). {folder} is ready."
        ) from error
    return str(made)
