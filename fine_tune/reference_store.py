"""Reference log-probabilities on disk, shared by every run that would compute the same ones."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from fine_tune import safe_load
from fine_tune.errors import CheckpointError, StorageError
from fine_tune.storage import write_bytes

TENSOR = "logps"


class ReferenceStore:
    """Summed log-probabilities of both completions of every training row, under one reference.

    A file is named by a hash of everything that decides its numbers: base, reference adapter, tokenizer, template, rows,
    the plan that packs them together, kernels, precision and device. A row that is still missing is NaN.

    Args:
        folder: Where the files are; made when first needed.
        key: What decides the numbers, as plain values.
        num_rows: Training rows.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], *, num_rows: int) -> None:
        self.folder = folder
        self.key = json.dumps(dict(key), sort_keys=True, default=str)
        self.path = folder / f"{hashlib.sha256(self.key.encode()).hexdigest()[:32]}.safetensors"
        self.values = torch.full((num_rows, 2), math.nan, dtype=torch.float64)

    def open(self) -> None:
        """Make the folder and lock the file once, so that a place that cannot be written to is told before any work.

        Raises:
            StorageError: It cannot be made or locked.
        """
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock"):
                return

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, StorageError) as error:
            reason = error if isinstance(error, OSError) else error.__cause__
            told = os.strerror(reason.errno) if isinstance(reason, OSError) and reason.errno else str(error)
            raise StorageError(
                f"objective.reference_store={self.folder}: cannot be written to ({told}). Name a folder on a disk with space, or "
                "set objective.reference_store=null."
            ) from error

    def read(self) -> int:
        """Take what is on disk and return the number of rows that are known.

        Raises:
            CheckpointError: The file is damaged, or was written for something else.
        """
        if self.path.is_file():
            found = self._load()
            missing = self.values.isnan()
            self.values = torch.where(missing, found, self.values)
        return int((~self.values.isnan().any(1)).sum())

    def _load(self) -> Tensor:
        try:
            with safe_load.opened_tensors(self.path) as file:
                found: Tensor = file.get_tensor(TENSOR)
                notes = file.metadata() or {}
        except (SafetensorError, CheckpointError) as error:
            raise self._refusal(f"damaged ({error})") from error
        if notes.get("key") != self.key or found.shape != self.values.shape or found.dtype != torch.float64:
            raise self._refusal("written for other data, another reference or another plan")
        if notes.get("sha256") != _sha256(found):
            raise self._refusal("its content is not what was saved")
        return found

    def _refusal(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"objective.reference_store: {self.path} is refused: {reason}. Delete that file to have it computed again, or set "
            "objective.reference_store=null."
        )

    def save(self) -> None:
        """Write what is known, together with what another run may have added meanwhile.

        Raises:
            CheckpointError: What is there by now is refused.
            StorageError: The disk refuses.
        """
        self.open()
        with self._writing(), FileLock(f"{self.path}.lock"):
            self.read()
            notes = {"key": self.key, "sha256": _sha256(self.values)}
            write_bytes(self.path, save({TENSOR: self.values}, metadata=notes))

    def known(self, rows: Sequence[int]) -> bool:
        """Tell whether all of these rows have values."""
        return not bool(self.values[list(rows)].isnan().any())

    def put(self, rows: Sequence[int], logps: Tensor) -> None:
        """Set the values of rows from ``[2 * len(rows)]`` completions, chosen before rejected."""
        self.values[list(rows)] = logps.detach().to("cpu", torch.float64).view(-1, 2)

    def distance(self, rows: Sequence[int], logps: Tensor) -> float:
        """Return how far, in nats, recomputed values of rows are from these at most; infinite where one is no number."""
        found = (self.values[list(rows)] - logps.detach().to("cpu", torch.float64).view(-1, 2)).abs()
        return found.nan_to_num(nan=math.inf).max().item()

    def refuse(self, rows: Sequence[int] | None, distance: float, *, bound: float) -> NoReturn:
        """Refuse the store because of recomputed values, of these rows or of another process's.

        Raises:
            CheckpointError: Always.
        """
        whose = f"rows {list(rows)[:4]}" if rows is not None else "another process's rows"
        raise self._refusal(f"recomputed values of {whose} differ by {distance:.3g} nats (bound {bound:.3g})")


def _sha256(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()
