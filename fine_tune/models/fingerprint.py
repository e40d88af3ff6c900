"""A short identity of a base model, read from its files: two bases of one shape differ in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from fine_tune import safe_load
from fine_tune.errors import CheckpointError

SAMPLE_BYTES = 4096
# Keys that transformers adds or rewrites without changing the model.
VOLATILE = {
    "transformers_version",
    "_name_or_path",
    "torch_dtype",
    "dtype",
    "use_cache",
    "_attn_implementation_autoset",
}


def base_fingerprint(folder: Path) -> str:
    """Hash config, tensor names, shapes, dtypes and the first 4 KiB of every tensor of a model folder.

    Raises:
        CheckpointError: No safetensors file, one whose header is damaged, or a config that cannot be read.
    """
    digest = hashlib.sha256()
    try:
        config = safe_load.json_object(folder / "config.json")
    except safe_load.Unreadable as error:
        raise CheckpointError(f"{folder / 'config.json'}: damaged ({error}). Fetch the model again.") from error
    kept = {key: value for key, value in config.items() if key not in VOLATILE}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no .safetensors file. Convert the weights to safetensors first.")
    for name, record in sorted(item for file in files for item in _tensors(file)):
        digest.update(f"{name}\0{record[0]}\0{record[1]}\0".encode())
        digest.update(record[2])
    return digest.hexdigest()


def _tensors(file: Path) -> Iterator[tuple[str, tuple[str, str, bytes]]]:
    """Yield (name, (dtype, shape, first bytes)) straight from the file's header."""
    # Checks the whole header first: sizes, and that tensors lie side by side without a gap.
    safe_load.opened_tensors(file, advice="Fetch the file again.")
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            stream.seek(8 + size + begin)
            yield name, (entry["dtype"], str(entry["shape"]), stream.read(min(SAMPLE_BYTES, end - begin)))
