"""Two bases of one shape differ in their fingerprint; one base under two library versions does not."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fine_tune.errors import CheckpointError
from fine_tune.models.fingerprint import SAMPLE_BYTES, base_fingerprint

from .conftest import llama


@pytest.fixture
def folder(base_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_folder, tmp_path / "copy"))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed({**config, **changes}.items()))))


def test_copies_agree_and_another_seed_does_not(base_folder: Path, folder: Path, tmp_path: Path) -> None:
    assert base_fingerprint(folder) == base_fingerprint(base_folder)
    assert len(base_fingerprint(folder)) == 64
    llama(seed=1).save_pretrained(str(tmp_path / "other"))
    assert base_fingerprint(tmp_path / "other") != base_fingerprint(folder)


def test_keys_that_libraries_rewrite_do_not_count(base_folder: Path, folder: Path) -> None:
    edit_config(
        folder, transformers_version="9.9", dtype="bfloat16", torch_dtype="float16", use_cache=False, _name_or_path="x"
    )
    assert base_fingerprint(folder) == base_fingerprint(base_folder)


@pytest.mark.parametrize("change", [{"rope_theta": 5.0}, {"num_attention_heads": 8}, {"model_type": "mistral"}])
def test_keys_that_change_the_model_count(base_folder: Path, folder: Path, change: dict[str, object]) -> None:
    edit_config(folder, **change)
    assert base_fingerprint(folder) != base_fingerprint(base_folder)


@pytest.mark.parametrize("how", ["value", "name", "dtype", "shape"])
def test_every_tensor_counts(base_folder: Path, folder: Path, how: str) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    last = sorted(tensors)[-1]
    if how == "value":
        tensors[last].flatten()[0] += 1e-3
    elif how == "name":
        tensors["z" + last] = tensors.pop(last)
    elif how == "dtype":
        # The same bytes under another name of their kind.
        tensors[last] = tensors[last].view(torch.int32)
    else:
        tensors[last] = tensors[last].reshape(1, -1)
    save_file(tensors, file)
    assert base_fingerprint(folder) != base_fingerprint(base_folder)


def test_shards_count_like_one_file(base_folder: Path, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for number, part in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"model-{number}.safetensors")
    assert base_fingerprint(folder) == base_fingerprint(base_folder)


def test_only_the_first_bytes_of_a_tensor_are_read(base_folder: Path, folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    table = tensors["model.embed_tokens.weight"].flatten()
    assert table.numel() * 4 > SAMPLE_BYTES, "the example must be longer than the sample"
    table[SAMPLE_BYTES // 4] += 1
    save_file(tensors, file)
    assert base_fingerprint(folder) == base_fingerprint(base_folder)
    table[SAMPLE_BYTES // 4 - 1] += 1
    save_file(tensors, file)
    assert base_fingerprint(folder) != base_fingerprint(base_folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 50) + b'{"a"',
        struct.pack("<Q", 4) + b"\xff\xfe{}",
        struct.pack("<Q", 1 << 62) + b"{}",
    ],
    ids=["empty", "short", "cut", "no-text", "huge"],
)
def test_a_damaged_header_is_named(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged or missing .*Fetch the file again"):
        base_fingerprint(folder)


def test_a_folder_without_safetensors_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file\. Convert the weights"):
        base_fingerprint(folder)
