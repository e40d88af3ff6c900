"""From overrides to one checked, resolved config: a plain dict that everything else is built from.

``check_config`` reports every problem at once and imports neither torch nor lightning nor transformers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fine_tune import safe_load
from fine_tune.checks import broken_rules, check_resolved, field_problems, leaf_items
from fine_tune.errors import ConfigError
from fine_tune.overrides import Words, expand, group_options, read_words
from fine_tune.problems import unique, unknown_key
from fine_tune.references import plain, resolve
from fine_tune.schema import known_keys

# A value that is typed replaces the default of its alternatives, which belong to the value it replaces.
REPLACES = {
    "trainer.max_steps": ("trainer.max_epochs",),
    "trainer.max_epochs": ("trainer.max_steps",),
    "data.path": ("data.hub", "data.revision", "data.subset"),
    "data.hub": ("data.path", "data.revision", "data.subset"),
    "model.path": ("model.revision",),
}
# Groups of keys whose names depend on a format or a schedule; rules check them.
OPEN_KEYS = ("data.options.", "data.sources.", "optim.schedule_options.")
# What may change when a run goes on: how long, where, how fast and how it is watched, never what it computes but for rounding.
RESUMABLE = re.compile(
    r"resume|trainer\.(max_steps|max_epochs|num_workers|accelerator|devices|num_nodes|strategy)|logger(\..+)?|callbacks\.\w+\.every_n_steps"
    r"|trainer\.(speed|micro_batch_tokens|recompute|offload|compile|fused_lora|dense_base|memory_limit_gb|capability|checklist)|objective\.reference_store"
)
CODE = "model.trust_remote_code"
# Keys that runs of earlier versions do not have, and what they did.
LATER_TRAINER_KEYS = {"dense_base": None, "capability": None, "memory_limit_gb": None, "checklist": True}


class Checked(NamedTuple):
    """A config that passed every check, and the overrides that made it."""

    cfg: dict[str, Any]
    overrides: list[str]


def find_conf_dir() -> Path:
    """Return the folder of config files: inside the installed package, else the repository's.

    Raises:
        ConfigError: Neither is there.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(f"conf: no config folder beside or in {package}. Reinstall the package.")


def check_config(overrides: Sequence[str], *, multirun: bool = False) -> Checked:
    """Compose, resolve and check the config that overrides ask for; with ``multirun``, one job of a sweep.

    Raises:
        ConfigError: All problems together.

    Example:
        >>> check_config(["optim.lr=1e-4"]).cfg["optim"]["lr"]
        0.0001
        >>> check_config(["optim.lrr=1e-4"])
        Traceback (most recent call last):
        fine_tune.errors.ConfigError: 1 problem(s) in the config:
          - optim.lrr: unknown key. Did you mean optim.lr?
    """
    words = read_words(overrides, group_options(find_conf_dir()), known_keys())
    problems = list(words.problems)
    if words.values.get("resume") is not None:
        cfg = _saved_config(words, problems)
        problems += ["resume: continues one run. Leave out -m."] if multirun else []
    else:
        cfg = _fresh_config(words, problems, multirun=multirun)
    if problems:
        raise ConfigError(unique(problems))
    return Checked(cfg, list(overrides))


def check_sweep(overrides: Sequence[str]) -> list[Checked]:
    """Check every combination of a sweep before the first starts.

    Raises:
        ConfigError: The problems of all combinations together.
    """
    return check_jobs(expand(overrides))


def check_jobs(combinations: Sequence[Sequence[str]]) -> list[Checked]:
    """Check the jobs of a sweep, each given as its words.

    Raises:
        ConfigError: The problems of all of them together.
    """
    checked, problems = [], []
    for combination in combinations:
        try:
            checked.append(check_config(combination, multirun=True))
        except ConfigError as error:
            problems += error.problems
    names = [job.cfg["run_name"] for job in checked if job.cfg["run_name"] is not None]
    if len(set(names)) < len(names):
        problems.append(f"run_name = {names[0]}: the jobs of a sweep need different names. Leave it out.")
    if problems:
        raise ConfigError(unique(problems))
    return checked


def resumed_config(overrides: Sequence[str]) -> Checked:
    """Return the config of the run named by ``resume=``, with the few changes a resumed run may make.

    Raises:
        ConfigError: There is no such run, or something else is changed.
    """
    if not any(text.lstrip("+").startswith("resume=") for text in overrides):
        raise ConfigError("resume: no value. Pass resume=<run folder>.")
    return check_config(overrides)


def _fresh_config(words: Words, problems: list[str], *, multirun: bool) -> dict[str, Any]:
    try:
        tree = _compose(tuple(words.groups.items()))
    except (HydraException, OmegaConfBaseException) as error:
        problems.append(str(error).splitlines()[0])
        return {}
    problems += _mode_problems(words, multirun=multirun)
    _apply(words, tree, problems)
    raw = plain(tree)
    cfg, bad = resolve(tree, raw, problems, words.refused)
    found, wrong = field_problems(cfg, typed=tuple(words.values), skip=bad, raw=raw)
    problems += [*found, *broken_rules(cfg, bad | wrong)]
    for group in ("callbacks", "logger"):
        if isinstance(cfg.get(group), dict):
            cfg[group] = {name: node for name, node in cfg[group].items() if node is not None}
    if multirun and cfg.get("sweep_dir") is None:
        cfg["sweep_dir"] = "runs"
    return cfg


def _saved_config(words: Words, problems: list[str]) -> dict[str, Any]:
    folder = Path(str(words.values["resume"])).expanduser()
    saved = folder / "config.yaml"
    if not saved.is_file():
        problems.append(f"resume = {folder}: no config.yaml in it. Pass the folder of a run, such as runs/<run_name>.")
        return {}
    try:
        base = safe_load.yaml_text(saved.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        base = None
    if not isinstance(base, dict):
        problems.append(f"resume = {folder}: its config.yaml cannot be read. Restore it from a copy.")
        return {}
    problems += _untyped_code(base, words, folder)
    if isinstance(base.get("trainer"), dict):
        base["trainer"] = LATER_TRAINER_KEYS | base["trainer"]
    # Never interpolated: the file is data from a folder, not config of ours.
    for key in (*words.groups, *words.values):
        if not RESUMABLE.fullmatch(key) and not (key == CODE and words.values.get(key) is True):
            known = key in words.groups or key in known_keys() or key.startswith(OPEN_KEYS)
            advice = "cannot change when a run goes on. Start a new one, such as with init_from="
            problems.append(f"{key}: {advice}{folder}." if known else unknown_key(key, known_keys()))
    allowed = {key: value for key, value in words.values.items() if RESUMABLE.fullmatch(key)}
    if "logger" in words.groups:
        base["logger"] = OmegaConf.to_container(_compose((("logger", words.groups["logger"]),)).logger)
    tree = OmegaConf.create(copy.deepcopy({key: base.get(key) for key in ("trainer", "callbacks", "logger", "objective")}))
    tree.resume = None
    _apply(words._replace(values=allowed), tree, problems)
    base |= plain(tree)
    problems += check_resolved(base)
    return base


def _untyped_code(base: Mapping[str, Any], words: Words, folder: Path) -> Iterator[str]:
    """Refuse to run a model's code because a folder says so: it may come from anywhere."""
    model = base.get("model")
    if isinstance(model, dict) and model.get("trust_remote_code") and words.values.get(CODE) is not True:
        yield (
            f"resume = {folder}: its config.yaml asks to run code from the model's repository. Read that code, then pass "
            f"{CODE}=true."
        )


@lru_cache(maxsize=64)
def _composed(groups: tuple[tuple[str, str | None], ...]) -> DictConfig:
    # A job started by hydra.main, or a notebook, has a Hydra of its own, which must be back afterwards.
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(find_conf_dir()), version_base="1.3"):
            chosen = [f"{group}={'null' if option is None else option}" for group, option in groups]
            return compose("train", overrides=chosen)
    finally:
        GlobalHydra.instance().hydra = outer


def _compose(groups: tuple[tuple[str, str | None], ...]) -> DictConfig:
    tree = copy.deepcopy(_composed(groups))
    OmegaConf.set_struct(tree, False)
    for group in ("callbacks", "logger"):
        # An experiment may set values of a callback that callbacks=none has just left out.
        for name in [str(name) for name, node in tree[group].items() if node is not None and "_target_" not in node]:
            del tree[group][name]
    return tree


def _mode_problems(words: Words, *, multirun: bool) -> Iterator[str]:
    typed = {key for key, value in words.values.items() if value is not None}
    if not multirun and (words.groups.get("sweep") or any(key.startswith("sweep.") for key in typed)):
        yield "sweep: only with -m."
    if multirun and "run_dir" in typed:
        yield "run_dir: one folder cannot hold the runs of a sweep. Pass sweep_dir=<folder>."
    if not multirun and "sweep_dir" in typed:
        yield "sweep_dir: only with -m. Pass run_dir=<folder>, or -m to sweep."
    if multirun and words.values.get("trainer.devices", 1) not in (1, None):
        yield "trainer.devices: a sweep runs on one device at a time. Start the runs one by one, without -m."


def _apply(words: Words, tree: DictConfig, problems: list[str]) -> None:
    candidates = [
        *known_keys(),
        *(leaf for leaf, _ in leaf_items(OmegaConf.to_container(tree)) if "[" not in leaf),
    ]
    for key, value in words.values.items():
        if problem := _key_problem(key, words, tree, candidates):
            problems.append(problem)
            continue
        try:
            OmegaConf.update(tree, key, value, merge=True, force_add=True)
        except OmegaConfBaseException as error:
            problems.append(f"{key} = {value}: {str(error).splitlines()[0]}. Write it as text or a number.")
    for key, replaced in REPLACES.items():
        if words.values.get(key) is not None:
            for other in replaced:
                if other not in words.values:
                    OmegaConf.update(tree, other, None, force_add=True)


def _key_problem(key: str, words: Words, tree: DictConfig, candidates: Sequence[str]) -> str | None:
    group, _, rest = key.partition(".")
    if group in ("callbacks", "logger") and rest:
        return _plugin_problem(key, words, tree, candidates)
    if key in candidates or key.startswith(OPEN_KEYS):
        return None
    return unknown_key(key, candidates)


def _plugin_problem(key: str, words: Words, tree: DictConfig, candidates: Sequence[str]) -> str | None:
    """Judge a key of callbacks or logger; with a plus, their classes may take arguments we do not list."""
    group, name = key.split(".")[:2]
    value, added = words.values[key], key in words.added
    if name in tree[group]:
        return None if added or key in candidates else unknown_key(key, candidates)
    options = group_options(find_conf_dir())[group]
    if name not in options and f"{group}.{name}" not in candidates:
        return None if added else unknown_key(key, candidates)
    if value is None or (added and isinstance(value, dict)):
        return None
    listed = ", ".join(options)
    return f"{key}: {group}.{name} is not part of this run. Choose the option of {group} that has it: {listed}."
