"""What `train --help` prints: the groups with their options, and the config that the words make."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fine_tune import safe_load
from fine_tune.config import find_conf_dir
from fine_tune.errors import ConfigError
from fine_tune.overrides import for_hydra, group_options, read_words
from fine_tune.problems import unknown_key
from fine_tune.schema import known_keys


def help_text(overrides: Sequence[str]) -> str:
    """Write the help of `train`; values that a job would still need stay open in it.

    Hydra's own help composes the same config, but lists the groups by loading each of them: that takes most of two seconds.

    Raises:
        ConfigError: The words cannot be read, or name what is not there.

    Example:
        >>> "objective: dpo, sft" in help_text(["optim.lr=3e-5"])
        True
    """
    folder = find_conf_dir()
    groups = group_options(folder)
    words = read_words(overrides, groups, known_keys())
    open_ended = ("callbacks.", "logger.", "data.options.", "data.sources.", "optim.schedule_options.")
    unknown = [key for key in words.values if not key.startswith(open_ended) and key not in known_keys()]
    if problems := [*words.problems, *(unknown_key(key, known_keys()) for key in unknown)]:
        raise ConfigError(problems)
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            composed = OmegaConf.to_yaml(compose("train", overrides=for_hydra(overrides, groups)))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    said = safe_load.yaml_text((folder / "train.yaml").read_text(encoding="utf-8"))["hydra"]["help"]
    listed = "\n".join(f"{group}: {', '.join(options)}" for group, options in sorted(groups.items()))
    return (
        f"{said['header']}\n\n== Groups: choose with group=option ==\n\n{listed}\n\n"
        f"== Config: set with key=value ==\n\n{composed}\n{said['footer']}\nOther verbs: fine-tune --help"
    )
