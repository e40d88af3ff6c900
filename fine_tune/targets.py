"""The one place where a ``_target_`` of the config becomes a class."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from fine_tune.errors import ConfigError

# Package -> how deep below it a class may sit: ours anywhere, of others only what they export.
ALLOWED_PACKAGES = {
    "fine_tune.data": 9,
    "fine_tune.modules": 9,
    "fine_tune.callbacks": 9,
    "fine_tune.tracking": 9,
    "torch.optim": 1,
    "bitsandbytes.optim": 1,
}
ALLOWED_CLASSES = {
    # Not ModelCheckpoint (saves the frozen base) nor OnExceptionCheckpoint (later fits resume from its file).
    "lightning.pytorch.callbacks.EarlyStopping",
    "lightning.pytorch.callbacks.LearningRateMonitor",
    "lightning.pytorch.callbacks.DeviceStatsMonitor",
    "lightning.pytorch.callbacks.Timer",
    "lightning.pytorch.loggers.CSVLogger",
    "lightning.pytorch.loggers.TensorBoardLogger",
    "lightning.pytorch.loggers.WandbLogger",
    "lightning.pytorch.loggers.MLFlowLogger",
    "lightning.pytorch.loggers.CometLogger",
}
NAME = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)*\.[A-Z]\w*", re.ASCII)


def refusal(target: Any) -> str | None:
    """Say why a target is not allowed, or None; nothing is imported.

    Example:
        >>> refusal("torch.optim.AdamW")
        >>> refusal("os.system")
        'os.system is not on the list of classes a config may name'
    """
    if not isinstance(target, str):
        return f"{target!r} is not a class name"
    if target in ALLOWED_CLASSES:
        return None
    for package, depth in ALLOWED_PACKAGES.items():
        below = target.removeprefix(f"{package}.")
        if below != target and below.count(".") < depth and NAME.fullmatch(target):
            return None
    return f"{target} is not on the list of classes a config may name"


def targets_in(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every ``_target_`` of a tree with its dotted key, those in lists included."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            path = f"{key}.{name}" if key else str(name)
            if name == "_target_":
                yield path, value
            else:
                yield from targets_in(value, path)
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from targets_in(value, f"{key}[{index}]")


def resolve(target: str) -> type[Any]:
    """Import the class a target names.

    Raises:
        ConfigError: The target is not allowed, does not exist, or is only reached through another package.
    """
    if problem := refusal(target):
        raise ConfigError(
            f"_target_: {problem}. Name one of ours, torch.optim, bitsandbytes.optim, or a listed logger."
        )
    module_name, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"_target_ = {target}: cannot be imported ({error}). Check the name.") from error
    package = next((p for p in ALLOWED_PACKAGES if target.startswith(f"{p}.")), module_name)
    # A module of ours that imports something foreign must not make it reachable.
    if not inspect.isclass(found) or not f"{found.__module__}.".startswith(f"{package}."):
        raise ConfigError(f"_target_ = {target}: must be a class defined in {package}. Name the class itself.")
    return found


def check_arguments(node: Mapping[str, Any]) -> None:
    """Check that a node's class takes the keys beside it, without building it.

    Raises:
        ConfigError: It does not, or the class cannot be imported.
    """
    target = node["_target_"]
    try:
        inspect.signature(resolve(target)).bind_partial(**{key: node[key] for key in node if key != "_target_"})
    except TypeError as error:
        raise ConfigError(f"_target_ = {target}: {error}. Check the keys beside it.") from error


def build(node: Mapping[str, Any], **extra: Any) -> Any:
    """Build the object a config node names, with the node's other keys and ``extra`` as arguments.

    Raises:
        ConfigError: The target is not allowed, the node holds another node or Hydra's own switches, or the
            class does not take these arguments.
    """
    target = node.get("_target_")
    arguments = {name: value for name, value in node.items() if name != "_target_"}
    if inner := [key for key, _ in targets_in(arguments)]:
        raise ConfigError(f"{inner[0]}: a class inside the arguments of {target} is not built. Remove it.")
    if switches := [name for name in arguments if name.startswith("_")]:
        raise ConfigError(f"{switches[0]}: not a setting of {target}. Remove it.")
    found = resolve(target)  # type: ignore[arg-type]
    try:
        return found(**{**arguments, **extra})
    except TypeError as error:
        raise ConfigError(f"_target_ = {target}: {error}. Check the keys beside it.") from error
