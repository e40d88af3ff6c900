"""What somebody who means harm would put into files: code in pickles, bombs in YAML, lies in headers, names that are paths."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import torch


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


def states(canary: Path) -> dict[str, Any]:
    """Trainer states with code at different depths."""
    evil = Evil(canary)
    return {
        "top": evil,
        "beside": {"step": 1, "x": evil},
        "in the optimizer": {"optimizer": {"state": {0: {"exp_avg": torch.zeros(2), "step": evil}}, "param_groups": []}},
        "in a list": {"callbacks": [[{"a": (1, evil)}]]},
        "as an instantiator": {"hyper_parameters": {"_instantiator": evil, "lr": 1.0}},
        "as a key": {"rng": {(1, 2): evil}},
    }


def sings(content: bytes, canary: Path) -> bool:
    """Tell whether bytes make the canary when they are unpickled, and take it away again."""
    pickle.loads(content)
    was_there = canary.exists()
    canary.unlink()
    return was_there


WIDE = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
MERGED = "m0: &m0 {x: 1, y: 2}\n" + "".join(
    f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 10)}]}}\n" for i in range(1, 10)
)
# YAML that would run something, never end, or fill the memory. Each is valid below a key of a mapping.
YAML = {
    "object": "x: !!python/object/apply:os.system ['true']\n",
    "name": "x: !!python/name:os.system\n",
    "module": "x: !!python/module:os\n",
    "new": "x: !!python/object/new:subprocess.Popen [['true']]\n",
    "function": "x: !function os.system\n",
    "aliases": WIDE,
    "merged aliases": MERGED,
    "itself": "x: &x [*x]\n",
    "chain": "c0: &c0 [x]\n" + "".join(f"c{i}: &c{i} [*c{i - 1}]\n" for i in range(1, 300)),
    "depth": f"x: {'[' * 300}{']' * 300}\n",
    "size": f"x: {'y' * 1_500_000}\n",
    "digits": f"x: {'9' * 5000}\n",
}


def safetensors(header: Any, data: bytes = b"\0" * 8, *, size: int | None = None) -> bytes:
    """A file of the format whose header says whatever it is told to say."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(begin: int, end: int, *, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape or [(end - begin) // 4], "data_offsets": [begin, end]}


HEADERS = {
    "nothing": b"",
    "cut in the size": b"\x10\0\0",
    "cut in the header": safetensors({"a": entry(0, 8)})[:20],
    "cut in the data": safetensors({"a": entry(0, 8)}, b"\0" * 4),
    "a header of 2**62 bytes": safetensors({"a": entry(0, 8)}, size=1 << 62),
    "a header of 100 MB": safetensors(b"{" + b" " * 100_000_010),
    "overlapping tensors": safetensors({"a": entry(0, 8), "b": entry(4, 8)}),
    "a gap": safetensors({"a": entry(0, 4), "b": entry(8, 12)}, b"\0" * 12),
    "bytes that no tensor has": safetensors({"a": entry(0, 4)}, b"\0" * 64),
    "a shape of more than there is": safetensors({"a": entry(0, 8, shape=[1 << 40])}),
    "a shape that overflows": safetensors({"a": entry(0, 8, shape=[1 << 63, 4])}),
    "negative offsets": safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}),
    "an unknown type": safetensors({"a": entry(0, 8, dtype="EVIL")}),
    "a list": safetensors([]),
    "a deep list": safetensors(b"[" * 100_000),
    "an entry without offsets": safetensors({"a": {}}),
    "no text": safetensors(b"\xff\xfe{}"),
}

# What is no name of a folder of ours, whatever system reads it.
PATHS = ["../../x", "..", ".", "/etc/x", "a/b", "a\\b", "C:\\x", "C:x", "x\0y", "y" * 300, "", " ", "a b", "\u202ex", "x\n", "~",
         "$HOME", "-rf\n"]  # fmt: skip
