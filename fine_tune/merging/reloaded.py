"""The merged folder, read in a process of its own that knows nothing of training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fine_tune import safe_load
from fine_tune.device import fits
from fine_tune.errors import CheckpointError
from fine_tune.evaluation.generate import Generated
from fine_tune.passport.replay import NUM_TOKENS, Said, measure

SCRIPT = Path(__file__).with_name("reload.py")


@dataclass
class Reloaded:
    """What the folder says.

    Attributes:
        said: Its own greedy continuation of each prompt.
        logits: At every position of the given sequences.
        dtype: What was computed in.
        peak_rss_bytes: The most memory that the process held; None where the system does not tell.
    """

    said: list[Said]
    logits: list[Tensor]
    dtype: torch.dtype
    peak_rss_bytes: int | None


def reload(
    folder: Path,
    prompts: Sequence[Sequence[int]],
    sequences: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    num_values: int,
    options: dict[str, Any],
) -> Reloaded:
    """Load a folder in a fresh process and ask it.

    Args:
        folder: A model folder.
        prompts: Token ids to continue.
        sequences: Token ids to take logits of, one per prompt.
        stop_ids: Tokens that end a continuation.
        num_values: Numbers that the model holds.
        options: ``device`` and ``dtype`` it should have, ``pad_id``, ``trust_remote_code``.

    Raises:
        CheckpointError: It cannot be loaded there, or not every tensor finds its place.
    """
    device, dtype = _where(num_values, options["device"], options["dtype"])
    question = {
        "folder": str(folder.resolve()),
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "prompts": [list(ids) for ids in prompts],
        "sequences": [list(ids) for ids in sequences],
        "stop_ids": list(stop_ids),
        "max_new_tokens": NUM_TOKENS,
        "pad_id": options["pad_id"],
        "trust_remote_code": options["trust_remote_code"],
    }
    with tempfile.TemporaryDirectory(prefix="fine-tune-") as made:
        place = Path(made)
        (place / "question.json").write_text(json.dumps(question), encoding="utf-8")
        _run(place)
        answer = json.loads((place / "answer.json").read_text(encoding="utf-8"))
        logits = safe_load.tensors(place / "logits.safetensors")
    if answer["problems"]:
        raise CheckpointError(
            f"{folder.name}: tensors without a place after reloading: {', '.join(answer['problems'][:4])}."
        )
    said = [_said(own, logits[f"own.{i}"], len(prompts[i]), stop_ids) for i, own in enumerate(answer["continuations"])]
    given = [logits[f"given.{i}"] for i in range(len(prompts))]
    return Reloaded(said, given, dtype, answer["peak_rss_bytes"])


def _where(num_values: int, device: torch.device, dtype: torch.dtype) -> tuple[str, torch.dtype]:
    """Choose float32 where it fits, else the dtype of the files, else whatever devices and disk there are."""
    for place in dict.fromkeys((device, torch.device("cpu"))):
        for wanted in (torch.float32, dtype):
            if fits(num_values * wanted.itemsize, place):
                return str(place), wanted
    return "auto", dtype


def _run(place: Path) -> None:
    # -P: the script's own folder is not searched for modules.
    command = [sys.executable, "-P", str(SCRIPT), str(place / "question.json"), str(place)]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise CheckpointError(f"the merged folder does not load in a fresh process: {lines[-1]}")


def _said(own: list[int], logits: Tensor, num_prompt: int, stop_ids: Sequence[int]) -> Said:
    stopped = bool(own) and own[-1] in stop_ids
    ids = own[:-1] if stopped else own
    return measure(Generated(ids, stopped), logits[num_prompt - 1 : num_prompt + len(ids)], stop_ids)
