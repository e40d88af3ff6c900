"""Tasks of lm-evaluation-harness: found by name, refused where they would run code, loaded without the network."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fine_tune.errors import ConfigError, DataError, EnvironmentProblem, FineTuneError, UnsafeArtifact
from fine_tune.evaluation.harness_code import refuse_code, use_sandbox
from fine_tune.evaluation.harness_lines import quiet_bars
from fine_tune.rng import untouched_rng

# What lm-eval itself seeds with before it loads tasks: some shuffle their choices while they are read.
PYTHON_SEED, OTHER_SEED = 0, 1234
# Readers of files, as `dataset_path` names them; every other path is a data set on the hub.
READERS = ("arrow", "csv", "json", "pandas", "parquet", "text")


@dataclass(frozen=True)
class TaskSource:
    """Where tasks come from and what they may do.

    Attributes:
        include_path: Folder with task files of one's own; they win over the harness's.
        download: Whether data and metrics may be fetched from the hub.
        unsafe_code: Whether tasks may run code: what they generated, their data set's, and that of files in include_path.
    """

    include_path: str | None = None
    download: bool = False
    unsafe_code: bool = False

    @property
    def folder(self) -> Path | None:
        """The folder of one's own task files."""
        return None if self.include_path is None else Path(self.include_path).expanduser()


@dataclass(frozen=True)
class LoadedTasks:
    """The tasks by name, and the groups that sum them up."""

    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]


def load_tasks(names: Sequence[str], source: TaskSource, *, num_fewshot: int | None = None) -> LoadedTasks:
    """Load tasks with their data; no model is needed.

    Args:
        names: Tasks, groups or tags.
        source: Where they come from.
        num_fewshot: Examples in each prompt; None takes the task's own number.

    Raises:
        EnvironmentProblem: lm-evaluation-harness is not installed, or data are not here and may not be fetched.
        ConfigError: A name is unknown (close ones are named), or a task cannot be asked like this.
        DataError: A task cannot be read.
        UnsafeArtifact: A task would run code.
    """
    _prepare_library(source)
    manager = _manager(names, source)
    entries = {name: manager.task_index[name] for name in _members(names, manager.task_index)}
    if not source.unsafe_code:
        refuse_code(entries, source.folder)
        use_sandbox()
    with fixed_rng(), _offline(not source.download), nullcontext() if source.download else quiet_bars():
        loaded = _load(manager, names)
    _check(loaded.tasks, source, num_fewshot)
    for task in loaded.tasks.values():
        own = task.get_config("num_fewshot") or 0
        task.set_config(key="num_fewshot", value=own if num_fewshot is None else num_fewshot)
    return loaded


@contextmanager
def fixed_rng() -> Iterator[None]:
    """Run a block under lm-eval's own seeds; the caller's random states come back."""
    import random

    import numpy as np
    import torch

    with untouched_rng():
        random.seed(PYTHON_SEED)
        np.random.seed(OTHER_SEED)
        torch.manual_seed(OTHER_SEED)
        yield


def _prepare_library(source: TaskSource) -> None:
    if find_spec("lm_eval") is None:
        raise EnvironmentProblem(
            "eval=lm_eval needs lm-evaluation-harness, which is not installed. pip install 'fine-tune[lm-eval]' (in a copy of "
            "the repository: pip install -c constraints.txt -e '.[lm-eval]')."
        )
    # The library behind some metrics counts every load with a request, and runs what it fetches.
    os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"
    if not (source.download and source.unsafe_code):
        os.environ["HF_EVALUATE_OFFLINE"] = "1"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _manager(names: Sequence[str], source: TaskSource) -> Any:
    """Index the folder of one's own, and the harness's thousands of files only where that is not enough."""
    from lm_eval.tasks import TaskManager

    folder = source.folder
    if folder is not None:
        if not folder.is_dir():
            raise ConfigError(
                f"eval.include_path={source.include_path}: no such folder. Pass the folder of your task files."
            )
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if all(name in own.task_index for name in (*names, *_members(names, own.task_index))):
            return own
    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [name for name in dict.fromkeys(names) if name not in manager.task_index]:
        raise ConfigError([_unknown(name, manager.all_tasks) for name in unknown])
    return manager


def _unknown(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known, n=3, cutoff=0.6)
    advice = (
        f"Did you mean {' or '.join(close)}?"
        if close
        else "Pass names of lm-evaluation-harness, or eval.include_path=."
    )
    return f"eval.tasks: there is no task, group or tag {name!r}. {advice}"


def _members(names: Sequence[str], index: Mapping[str, Any]) -> list[str]:
    """Name the tasks, groups and tags that a choice comes to, itself included; inline ones are part of their group."""
    found: dict[str, None] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop(0)
        if name in found or name not in index:
            # A member that the index does not know is reported when it is loaded.
            continue
        found[name] = None
        entry = index[name]
        members = (entry.cfg or {}).get("task")
        waiting += sorted(entry.tags) if entry.yaml_path is None else []
        for member in members if isinstance(members, list) else []:
            waiting.append(member if isinstance(member, str) else str(member.get("task") or member.get("group")))
    return list(found)


@contextmanager
def _offline(active: bool) -> Iterator[None]:
    import datasets
    from huggingface_hub import constants

    places = [
        (constants, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_DATASETS_OFFLINE"),
    ]
    before = [getattr(*place) for place in places]
    try:
        for module, name in places:
            setattr(module, name, active or getattr(module, name))
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def _load(manager: Any, names: Sequence[str]) -> LoadedTasks:
    """Load one name after the other, so that a message can say which; a task that two of them hold is asked once."""
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # whatever a task's file or its data make the libraries raise
            raise _refusal(name, manager.task_index, error) from error
        tasks |= loaded["tasks"]
        groups |= loaded.get("groups") or {}
    return LoadedTasks(tasks, groups)


def _refusal(name: str, index: Mapping[str, Any], error: Exception) -> FineTuneError:
    paths = {str((index[member].cfg or {}).get("dataset_path")) for member in _members([name], index)}
    remote = sorted(path for path in paths if path not in (*READERS, "None") and not Path(path).exists())
    told = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, OSError) and remote:
        return EnvironmentProblem(
            f"eval.tasks: the data of {name} ({', '.join(remote[:3])}) are not here ({type(error).__name__}). Pass "
            "eval.download=true once, with the hub in reach and HF_HUB_OFFLINE unset, or write a task file for local data and "
            "pass eval.include_path=<its folder>."
        )
    return DataError(
        f"eval.tasks: {name} cannot be loaded ({type(error).__name__}: {told}). Correct it, or leave it out."
    )


def _check(tasks: Mapping[str, Any], source: TaskSource, num_fewshot: int | None) -> None:
    problems = []
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) and not source.unsafe_code:
            raise UnsafeArtifact(
                f"eval.tasks: {name} runs what the model wrote. Pass eval.unsafe_code=true, or leave it out."
            )
        if getattr(task, "MULTIMODAL", False):
            problems.append(f"eval.tasks: {name} asks about images or sound. Choose tasks of text.")
        if num_fewshot and task.get_config("num_fewshot") == 0:
            problems.append(
                f"eval.num_fewshot={num_fewshot}: {name} is fixed to no examples. Leave it null, or the task out."
            )
    if problems:
        raise ConfigError(problems)
