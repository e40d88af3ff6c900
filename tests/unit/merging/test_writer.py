"""Files that other readers of the format take, parted as asked, one tensor in memory at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fine_tune.errors import CheckpointError
from fine_tune.merging.source import Source
from fine_tune.merging.writer import Slot, shards, write_shards

TENSORS = {
    "half": torch.randn(3, 5).bfloat16(),
    "flags": torch.tensor([True, False, True]),
    "single": torch.tensor(2.5),
    "whole": torch.randn(7),
    "places": torch.arange(4),
    "empty": torch.zeros(0, 4),
}
SLOTS = [Slot(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    write_shards(tmp_path, SLOTS, TENSORS.__getitem__, shard_bytes=1e9)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_files_hold_at_most_the_limit_and_the_index_names_them(tmp_path: Path) -> None:
    asked: list[str] = []

    def make(name: str) -> Tensor:
        asked.append(name)
        return TENSORS[name]

    write_shards(tmp_path, SLOTS, make, shard_bytes=40)
    assert sorted(asked) == sorted(TENSORS), "each is made once"
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) == 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"] == {"total_size": 30 + 3 + 4 + 28 + 32}
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], TENSORS[name])
    again = Source(tmp_path)
    assert all(torch.equal(again.get(name), tensor) for name, tensor in TENSORS.items())


def test_a_tensor_larger_than_the_limit_has_a_file_of_its_own() -> None:
    slots = [Slot(name, torch.uint8, (size,)) for name, size in (("a", 5), ("b", 50), ("c", 4), ("d", 6), ("e", 1))]
    assert [[slot.name for slot in part] for part in shards(slots, 10)] == [["a"], ["b"], ["c", "d"], ["e"]]


def test_sources_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds neither"):
        Source(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08" + bytes(20))
    with pytest.raises(CheckpointError, match="damaged or missing"):
        Source(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text("[]", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"index\.json: damaged"):
        Source(tmp_path)
