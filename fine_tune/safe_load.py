"""The one place where files from elsewhere become values: nothing in them runs, and none grows beyond its file.

Weights are safetensors, the state of a trainer is plain tensors and numbers, text is JSON or YAML without objects.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fine_tune.errors import CheckpointError, UnsafeArtifact

if TYPE_CHECKING:
    from torch import Tensor

# What no config, card or task of ours comes near: a text of this size, its depth, and its values with every alias written out.
MAX_CHARACTERS, MAX_DEPTH, MAX_VALUES = 1_000_000, 64, 100_000
MAX_JSON_BYTES = 256_000_000
ADVICE = "Use another checkpoint."


class Unreadable(ValueError):
    """A text that is not what it should be; the message says why, to stand in brackets."""


def yaml_text(text: str, *, tags: Mapping[str, Callable[[str], Any]] | None = None) -> Any:
    """Read YAML of plain values: no objects, and no aliases that stand for more than they could write out.

    Args:
        text: The YAML.
        tags: What is made of the text behind a tag, such as ``!function``; every other tag is refused.

    Raises:
        Unreadable: It is something else.

    Example:
        >>> yaml_text("a: [1, &x two, *x]")
        {'a': [1, 'two', 'two']}
        >>> yaml_text("!!python/name:os.system")
        Traceback (most recent call last):
        fine_tune.safe_load.Unreadable: could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.system'
    """
    if len(text) > MAX_CHARACTERS:
        raise Unreadable(f"longer than {MAX_CHARACTERS:,} characters")
    try:
        loader = _Loader(text, tags or {})
        root = loader.get_single_node()
        if root is None:
            return None
        num_values, depth = _size(root, {})
        if num_values > MAX_VALUES or depth > MAX_DEPTH:
            raise Unreadable(f"more than {MAX_VALUES:,} values, or nested deeper than {MAX_DEPTH}")
        return loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        raise Unreadable(error.problem or "no YAML") from error
    except yaml.YAMLError as error:
        raise Unreadable(str(error).partition("\n")[0]) from error
    except (ValueError, OverflowError, RecursionError) as error:
        # Numbers too long to read, dates that are none.
        raise error if isinstance(error, Unreadable) else Unreadable(str(error)) from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with a limit of depth, and with tags that belong to one text."""

    def __init__(self, text: str, tags: Mapping[str, Callable[[str], Any]]) -> None:
        super().__init__(text)
        self.tags, self.depth = tags, 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose one value and what is in it."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable(f"nested deeper than {MAX_DEPTH}")
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Make a value; of a known tag, what its reader makes of the text."""
        if node.tag in self.tags and isinstance(node, yaml.ScalarNode):
            return self.tags[node.tag](str(node.value))
        return super().construct_object(node, deep=deep)


def _size(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Count the values of a tree, and its depth, with every alias written out; something within itself has no end."""
    if id(node) not in known:
        known[id(node)] = MAX_VALUES + 1, 0  # what it comes to if it holds itself
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for pair in inner for part in pair] if isinstance(node, yaml.MappingNode) else inner
        sizes = [_size(part, known) for part in parts]
        known[id(node)] = 1 + sum(num for num, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
    return known[id(node)]


def json_text(text: str | bytes) -> Any:
    """Read JSON.

    Raises:
        Unreadable: It is none, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise Unreadable("nested too deeply") from error
    except ValueError as error:
        raise Unreadable(str(error)) from error


def json_object(file: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        Unreadable: It holds something else.
        OSError: It cannot be read.
    """
    if file.stat().st_size > MAX_JSON_BYTES:
        raise Unreadable(f"larger than {MAX_JSON_BYTES:,} bytes")
    found = json_text(file.read_bytes())
    if not isinstance(found, dict):
        raise Unreadable(f"no object but {type(found).__name__}")
    return found


def tensors(file: Path, *, advice: str = ADVICE) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file.

    Args:
        file: The file.
        advice: What to do about a damaged one.

    Raises:
        CheckpointError: It is damaged or missing.
    """
    # Imported here: what is wrong with a config is told without torch.
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(file))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: damaged or missing ({error}). {advice}") from error


def opened_tensors(file: Path, *, advice: str = ADVICE) -> Any:
    """Open a safetensors file to read tensor by tensor; its header is checked, with nothing overlapping or left out.

    Raises:
        CheckpointError: It is damaged or missing.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: damaged or missing ({error}). {advice}") from error


def trainer_state(file: Path, *, advice: str = ADVICE) -> dict[str, Any]:
    """Read the state of a trainer: tensors in plain containers.

    Raises:
        UnsafeArtifact: It holds something else, which could run; nothing of it has.
        CheckpointError: It is damaged or missing.
    """
    import torch

    try:
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        raise UnsafeArtifact(f"{file} holds more than plain tensors; it is not loaded.") from error
    except (RuntimeError, EOFError, KeyError, OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: damaged or missing ({error}). {advice}") from error


def refuse_foreign_links(folder: Path, *, key: str) -> None:
    """Refuse a folder in which a link leads to a file elsewhere, but for the blobs of the hub's own cache.

    Args:
        folder: A folder of weights and settings.
        key: What the words call it, for messages.

    Raises:
        UnsafeArtifact: Which link, and where it leads.
    """
    home = folder.resolve()
    cache = [home.parents[1] / "blobs"] if home.parent.name == "snapshots" else []
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        target = file.resolve()
        if file.is_symlink() and not any(target.is_relative_to(place) for place in (home, *cache)):
            raise UnsafeArtifact(
                f"{key}={folder}: {file.name} is a link to {target}, outside the folder. Replace it by the file itself."
            )
