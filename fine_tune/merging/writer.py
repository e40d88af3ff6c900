"""Safetensors files written tensor by tensor, so that memory holds one tensor and not a shard."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fine_tune.merging.source import DTYPES, INDEX, SINGLE


class Slot(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def shards(slots: Sequence[Slot], limit: float) -> list[list[Slot]]:
    """Part tensors, in their order, into files of at most ``limit`` bytes; a larger tensor has a file of its own."""
    found: list[list[Slot]] = []
    size = math.inf
    for slot in slots:
        if size + slot.num_bytes > limit:
            found.append([])
            size = 0
        found[-1].append(slot)
        size += slot.num_bytes
    return found


def write_shards(folder: Path, slots: Sequence[Slot], make: Callable[[str], Tensor], *, shard_bytes: float) -> None:
    """Write tensors into as many files as it takes, with an index where it is more than one.

    Args:
        folder: An existing folder.
        slots: What is written, in this order.
        make: Returns a tensor by its name, on the CPU; called once for each.
        shard_bytes: Largest file.
    """
    parts = shards(slots, shard_bytes)
    places: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        name = SINGLE if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        places.update({slot.name: name for slot in part})
        # Wide numbers first, as the format's own writer does: each then begins at a multiple of its size.
        _write(folder / name, sorted(part, key=lambda slot: -slot.dtype.itemsize), make)
    if len(parts) > 1:
        total = sum(slot.num_bytes for slot in slots)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(file: Path, slots: Sequence[Slot], make: Callable[[str], Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for slot in slots:
        begin, end = end, end + slot.num_bytes
        header[slot.name] = {"dtype": DTYPES[slot.dtype], "shape": list(slot.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for slot in slots:
            tensor = make(slot.name)
            assert (tensor.dtype, tuple(tensor.shape)) == (slot.dtype, slot.shape), slot.name
            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())
