"""The tensors of a model folder, one at a time, shard by shard."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fine_tune import safe_load
from fine_tune.errors import CheckpointError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# The format's names of what a model holds.
DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Source:
    """Reads a folder's safetensors as transformers chooses them; one file is open at a time.

    Attributes:
        files: The file of each tensor, in the order in which the files hold them.
        shapes: The shape of each.
        dtypes: The dtype of each.
    """

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._open: tuple[Path, Any] | None = None
        for file in _files(folder):
            opened = self._of(file)
            for name in opened.offset_keys():
                self.files[name] = file
                part = opened.get_slice(name)
                self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), _dtype(part.get_dtype(), name, file)

    def get(self, name: str) -> Tensor:
        """Read one tensor as it is stored."""
        try:
            return self._of(self.files[name]).get_tensor(name)  # type: ignore[no-any-return]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.files[name]}: {name} cannot be read ({error}). Fetch the file again."
            ) from error

    def _of(self, file: Path) -> Any:
        if self._open is None or self._open[0] != file:
            # The old one first: its pages count as ours as long as it is mapped.
            self._open = None
            self._open = (file, safe_load.opened_tensors(file, advice="Fetch the file again."))
        return self._open[1]


def _files(folder: Path) -> Iterable[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}. Convert the weights to safetensors first.")
    try:
        names = safe_load.json_object(index)["weight_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: damaged ({error}). Fetch the file again.") from error
    return [folder / Path(name).name for name in sorted(set(names))]


def _dtype(written: str, name: str, file: Path) -> torch.dtype:
    for dtype, text in DTYPES.items():
        if text == written:
            return dtype
    raise CheckpointError(f"{file}: {name} is stored as {written}, which cannot be merged. Use an unquantised model.")
