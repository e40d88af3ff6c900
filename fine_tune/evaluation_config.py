"""From the words of `evaluate` to one checked config: plain values, every mistake told at once, torch not imported."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, Field, ValidationError

from fine_tune.checks import leaf_items
from fine_tune.config import find_conf_dir
from fine_tune.errors import ConfigError
from fine_tune.evaluation_schema import EVALUATIONS, AnyEvaluation
from fine_tune.overrides import group_options, read_words
from fine_tune.problems import field_problem, unique, unknown_key
from fine_tune.schema import Method, Model, known_keys
from fine_tune.schema_types import Node, Seed, Text

PRIMARY = "evaluate"


def checkpoints(value: Any) -> Any:
    """Refuse what cannot be the words of ``ckpt=``."""
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
        raise ValueError("must be a run, checkpoint, adapter, model or base, or a list of them such as [base,runs/sft]")
    if len(set(words)) < len(words):
        raise ValueError("names the same checkpoint twice")
    return value


class EvaluateConfig(Node):
    """A whole resolved config of an evaluation."""

    ckpt: Annotated[Any, AfterValidator(checkpoints)]
    run_dir: Text | None
    seed: Seed
    accelerator: Literal["auto", "cpu", "gpu"]
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"]
    hints: dict[str, str]
    model: Model
    method: Method
    eval: Annotated[AnyEvaluation, Field(discriminator="name")]


def check_evaluation(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose, resolve and check an evaluation.

    Raises:
        ConfigError: All problems together.

    Example:
        >>> check_evaluation(["ckpt=base", "eval=mmlu", "eval.path=x", "eval.shots=0"])["eval"]["shots"]
        0
        >>> check_evaluation(["ckpt=base", "eval.shotz=0"])
        Traceback (most recent call last):
        fine_tune.errors.ConfigError: 1 problem(s) in the config:
          - eval.shotz: unknown key. Did you mean eval.shots?
    """
    return check_words(overrides, PRIMARY, EvaluateConfig)


def check_words(overrides: Sequence[str], primary: str, schema: type[Node]) -> dict[str, Any]:
    """Compose, resolve and check the words of a verb that takes ``ckpt=``, and ``model=`` and ``method=`` for what has no run.

    Args:
        overrides: The words.
        primary: Name of the config in ``conf/`` that holds the defaults.
        schema: The whole resolved config.

    Raises:
        ConfigError: All problems together.
    """
    folder = find_conf_dir()
    keys = known_keys(schema)
    words = read_words(overrides, group_options(folder, primary), keys)
    problems = list(words.problems)
    try:
        tree = copy.deepcopy(_composed(primary, tuple(words.groups.items())))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(unique([*problems, str(error).splitlines()[0]])) from error
    OmegaConf.set_struct(tree, False)
    for key, value in words.values.items():
        if key in keys:
            OmegaConf.update(tree, key, value, merge=True, force_add=True)
        else:
            problems.append(unknown_key(key, keys))
    if "model.path" in words.values and "model.revision" not in words.values:
        OmegaConf.update(tree, "model.revision", None)
    cfg: dict[str, Any] = OmegaConf.to_container(tree, resolve=True)  # type: ignore[assignment]
    problems += _problems(cfg, words.refused, schema)
    if problems:
        raise ConfigError(unique(problems))
    # A typed model stands for foreign adapters as well, whose own config names another.
    cfg["model_is_default"] = "model" not in words.groups and "model.path" not in words.values
    # A folder that holds its own template is asked in that one, unless another was typed.
    cfg["typed_text"] = [key for key in ("chat_template", "end_of_turn") if f"model.{key}" in words.values]
    return cfg


def _problems(cfg: dict[str, Any], refused: set[str], schema: type[Node]) -> list[str]:
    missing = [key for key, value in leaf_items(cfg) if value == "???"]
    found = [
        f"{key}: no value. {cfg['hints'].get(key, f'Pass {key}=<value>.')}" for key in missing if key not in refused
    ]
    try:
        schema.model_validate(cfg)
    except ValidationError as errors:
        for error in errors.errors(include_url=False):
            inside = error["loc"][0] == "eval" and len(error["loc"]) > 1
            key = ".".join(str(part) for part in (error["loc"][:1] + error["loc"][2:] if inside else error["loc"]))
            if key in missing:
                continue
            if error["type"] == "extra_forbidden":
                name = key.removeprefix("eval.")
                owners = [option for option, node in EVALUATIONS.items() if name in node.model_fields]
                other = f" Remove it, or pass eval={owners[0]}." if owners else ""
                found.append(f"{key}: eval={cfg['eval']['name']} has no such key.{other}")
            else:
                found.append(field_problem(key, error))
    return found


@lru_cache(maxsize=16)
def _composed(primary: str, groups: tuple[tuple[str, str | None], ...]) -> DictConfig:
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(find_conf_dir()), version_base="1.3"):
            return compose(primary, overrides=[f"{group}={option}" for group, option in groups])
    finally:
        GlobalHydra.instance().hydra = outer
