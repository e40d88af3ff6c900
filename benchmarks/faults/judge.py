"""The judge: what a run left is compared with the clean run bit for bit, and how it ended with what is promised.

It reads the files by itself, without the package under test.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

TIMED = ("tokens_per_second", "samples_per_second", "step_seconds", "mfu")
# What a summary holds that no clock decides.
FIGURES = (
    "steps",
    "epochs",
    "train_loss",
    "final_loss",
    "grad_norm",
    "skipped_steps",
    "preference_accuracy",
    "total_flops",
)
LONGEST_MESSAGE = 15


@dataclass
class Verdict:
    """What the judge says of one performance of a fault.

    Attributes:
        survived: It ended as promised.
        lost: Steps that were done and had to be done again.
        wrong: It claims success with other results than the clean run's.
        codes: Exit codes, one for each start.
        said: The last message.
        reasons: Why it did not survive.
    """

    survived: bool
    lost: int
    wrong: bool
    codes: list[int]
    said: str
    reasons: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Promise:
    """How a fault has to end.

    Attributes:
        codes: For each start the exit codes that are right.
        may_lose: Steps that each start may have to do again.
        says: Words of which each refusal must have one.
        finished: The last start ends with the clean run's results.
        lenient: Any exit code but 0 is a right refusal, and messages are not judged.
    """

    codes: Sequence[Sequence[int]]
    may_lose: int = 0
    says: Sequence[str] = ()
    finished: bool = True
    lenient: bool = False


def judge(
    promise: Promise,
    codes: Sequence[int],
    told: Sequence[str],
    *,
    losses: Sequence[int],
    differences: Sequence[str] | None,
    notes: Sequence[str] = (),
) -> Verdict:
    """Compare how the starts ended with what is promised.

    Args:
        promise: How they have to end.
        codes: Their exit codes.
        told: What each told on stderr.
        losses: Steps that each start did again.
        differences: Between the results and the clean run's; None where there are no results to compare.
        notes: Whatever else must not have happened.
    """
    reasons = [*notes, *_code_faults(promise, codes)]
    if not promise.lenient:
        for number, (code, text) in enumerate(zip(codes, told, strict=True), start=1):
            reasons += [f"start {number}: {fault}" for fault in _message_faults(code, text)]
    for words in promise.says:
        if not any(words in text for text in told):
            reasons.append(f"no message says {words!r}")
    if max(losses, default=0) > promise.may_lose:
        reasons.append(f"{max(losses)} steps were lost at once, {promise.may_lose} may be")
    # Success is claimed by exit code 0 alone: only then can a result be wrong.
    wrong = bool(codes) and codes[-1] == 0 and bool(differences)
    if promise.finished and differences is None:
        reasons.append("there is no result")
    if differences and (promise.finished or wrong):
        reasons += [f"differs from the clean run: {difference}" for difference in list(differences)[:3]]
    said = next((text for text in reversed(told) if text.strip()), "")
    return Verdict(not reasons, sum(losses), wrong, list(codes), said.strip(), reasons)


def _code_faults(promise: Promise, codes: Sequence[int]) -> list[str]:
    """Say which exit codes are not the promised ones."""
    found = []
    if len(codes) != len(promise.codes):
        found.append(f"{len(codes)} starts instead of {len(promise.codes)}")
    for number, (code, right) in enumerate(zip(codes, promise.codes, strict=False), start=1):
        refused = promise.lenient and code != 0 and 0 not in right
        if code not in right and not refused:
            found.append(f"start {number} ended with {code} instead of {' or '.join(map(str, right))}")
    return found


def _message_faults(code: int, text: str) -> list[str]:
    """Say what is wrong with the message of one start."""
    lines = [line for line in text.splitlines() if line.strip()]
    found = []
    if "Traceback (most recent call last)" in text or "unexpected error" in text:
        found.append("a traceback instead of a message")
    if code > 0 and not lines:
        found.append("it failed without a word")
    if code > 0 and len(lines) > LONGEST_MESSAGE:
        found.append(f"a message of {len(lines)} lines")
    return found


def differences(run: Path, clean: Path) -> list[str] | None:
    """Compare two finished runs: tensors, trainer state, metrics and figures, bit for bit; None if one has no result."""
    states = [_training_state(folder) for folder in (run, clean)]
    if any(state is None for state in states):
        return None
    return list(_different(states[0], states[1], ""))


def _training_state(run: Path) -> dict[str, Any] | None:
    """Read everything that a finished run promises, without what a clock decides."""
    places = sorted(run.glob("checkpoints/step-*/manifest.json"))
    if not places or not (run / "summary.json").is_file():
        return None
    newest = places[-1].parent
    try:
        trainer = torch.load(newest / "trainer.pt", map_location="cpu", weights_only=True)
        tensors = {name: load_file(str(file)) for name, file in (
            ("adapter", newest / "adapter.safetensors"), ("exported", run / "adapter" / "adapter_model.safetensors"),
        )}  # fmt: skip
    except (OSError, RuntimeError, SafetensorError) as error:
        return {"unreadable": str(error)}
    trainer["callbacks"].get("Throughput", {}).pop("seconds", None)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    broken = [name for state in tensors.values() for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    return {
        "checkpoint": newest.name,
        **tensors,
        "trainer": trainer,
        "metrics": _metrics(run / "metrics.jsonl"),
        "summary": {key: summary.get(key) for key in FIGURES},
        "not finite": broken,
    }


def _metrics(file: Path) -> list[dict[str, Any]] | str:
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        return f"damaged: {error}"
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]


def plain_differences(run: Path, clean: Path) -> list[str] | None:
    """Compare two finished plain runs: the exported adapter alone, bit for bit."""
    name = Path("adapter") / "adapter_model.safetensors"
    if not (run / name).is_file():
        return None
    try:
        found = load_file(str(run / name))
    except SafetensorError as error:
        return [f"unreadable: {error}"]
    return _different(found, load_file(str(clean / name)), "exported")


def answer_differences(run: Path, clean: Path) -> list[str] | None:
    """Compare two finished evaluations: the items byte for byte, the metrics but for seconds."""
    if not (run / "metrics.json").is_file():
        return None
    found = []
    if (run / "items.jsonl").read_bytes() != (clean / "items.jsonl").read_bytes():
        found.append("items.jsonl")
    metrics = [json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in (run, clean)]
    for one in metrics:
        one.pop("seconds", None)
    return [*found, *_different(metrics[0], metrics[1], "metrics")]


def _different(one: Any, other: Any, where: str) -> list[str]:
    """Name every place in which two values differ in type, keys, length or a single bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and _bits(one) == _bits(other)
        return [] if same else [where]
    if type(one) is not type(other):
        return [f"{where}: {type(one).__name__} instead of {type(other).__name__}"]
    if isinstance(one, Mapping):
        missing = [f"{where}.{key}: only in one" for key in one.keys() ^ other.keys()]
        return missing + [
            line for key in one if key in other for line in _different(one[key], other[key], f"{where}.{key}")
        ]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{where}: {len(one)} instead of {len(other)}"]
        return [
            line for i, pair in enumerate(zip(one, other, strict=True)) for line in _different(*pair, f"{where}[{i}]")
        ]
    return [] if one == other else [f"{where}: {str(one)[:60]} instead of {str(other)[:60]}"]


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
