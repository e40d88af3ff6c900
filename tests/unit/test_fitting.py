"""Everything that decides a stored reference value names its file; nothing else does."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fine_tune import fitting
from fine_tune.data.table import TokenTable
from fine_tune.device import DevicePlan
from fine_tune.fitting import Job, reference_key
from fine_tune.interrupts import StopSignals
from fine_tune.reference_store import ReferenceStore
from fine_tune.text.pairs import EncodedPair

CFG: dict[str, Any] = {
    "seed": 0,
    "run_name": "one",
    "method": {
        "bits": 4, "quant_type": "nf4", "double_quant": True, "trains": "adapter", "use_dora": False,
        "target_modules": "all-linear",
    },
    "model": {"dtype": "float32", "add_tokens": []},
    "data": {"max_seq_len": 64, "overflow": "drop"},
    "optim": {"global_batch_size": 8, "lr": 1e-4},
    "trainer": {
        "micro_batch_tokens": 128, "max_steps": 5,
        "speed": "plain", "recompute": None, "offload": None, "compile": None, "fused_lora": None, "dense_base": None,
    },
    "objective": {"head_chunk_tokens": 32, "beta": 0.1, "loss": "sigmoid"},
}  # fmt: skip
RECORD = {
    "base_fingerprint": "b", "tokenizer_fingerprint": "t", "chat_template": "chatml", "template_hash": "h",
    "data_fingerprint": "d", "scaling": {"r": 4, "lora_alpha": 8}, "reference_fingerprint": "r",
}  # fmt: skip
ROWS = [("a", EncodedPair([1, 2], [3], [4, 5])), ("b", EncodedPair([6], [7, 8], [9]))]
PLAN = DevicePlan(torch.device("cpu"), "cpu", "32-true", 1, 0)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with a processor and packages of its own."""
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some CPU 9\n")
    monkeypatch.setattr(fitting, "CPU_INFO", info)
    monkeypatch.setattr(fitting, "versions", lambda: {"torch": "2.0"})
    return info


def name(
    *changes: tuple[str, str | None, Any],
    record: dict[str, Any] | None = None,
    plan: DevicePlan = PLAN,
    rows: list[tuple[str, EncodedPair]] | None = None,
) -> str:
    """Return the name of the store's file under these changes of the config (group, key, value) and of all else."""
    cfg = copy.deepcopy(CFG)
    for group, setting, value in changes:
        (cfg if setting is None else cfg[group])[setting or group] = value
    job = Job(cfg, Path("runs/x"), plan, None, StopSignals())
    data = SimpleNamespace(prepared=SimpleNamespace(train=TokenTable.from_rows(rows or ROWS)))
    key = reference_key(job, RECORD | (record or {}), data)  # type: ignore[arg-type]
    return ReferenceStore(Path("stores"), key, num_rows=2).path.name


def test_the_same_gives_the_same_name() -> None:
    assert name() == name()


@pytest.mark.parametrize(
    "change",
    [
        ("seed", None, 1),
        ("optim", "global_batch_size", 4),
        ("trainer", "micro_batch_tokens", 256),
        ("trainer", "compile", True),
        ("trainer", "fused_lora", True),
        ("trainer", "dense_base", True),
        ("trainer", "recompute", "full"),
        ("trainer", "speed", "balanced"),
        ("method", "bits", 8),
        ("method", "quant_type", "fp4"),
        ("method", "double_quant", False),
        ("method", "use_dora", True),
        ("method", "target_modules", ["q_proj"]),
        ("model", "dtype", "bfloat16"),
        ("model", "add_tokens", ["<x>"]),
        ("data", "max_seq_len", 32),
        ("data", "overflow", "cut"),
        ("objective", "head_chunk_tokens", 64),
    ],
    ids=lambda change: f"{change[0]}.{change[1]}",
)
def test_a_setting_that_decides_values_changes_the_name(change: tuple[str, str | None, Any]) -> None:
    assert name(change) != name()


@pytest.mark.parametrize(
    "change",
    [
        ("optim", "lr", 1e-3),
        ("objective", "beta", 0.5),
        ("objective", "loss", "ipo"),
        ("run_name", None, "two"),
        ("trainer", "max_steps", 9),
        # This says in other words what plain means.
        ("trainer", "compile", False),
    ],
    ids=lambda change: f"{change[0]}.{change[1]}",
)
def test_a_setting_that_decides_none_leaves_the_name(change: tuple[str, str | None, Any]) -> None:
    assert name(change) == name()


@pytest.mark.parametrize("field", RECORD)
def test_each_fingerprint_of_the_run_changes_the_name(field: str) -> None:
    assert name(record={field: "another"}) != name()


@pytest.mark.parametrize(
    "plan",
    [
        DevicePlan(torch.device("cpu"), "cpu", "bf16-mixed", 1, 0),
        DevicePlan(torch.device("cpu"), "cpu", "32-true", 2, 0),
    ],
    ids=["precision", "ranks"],
)
def test_precision_and_ranks_change_the_name(plan: DevicePlan) -> None:
    assert name(plan=plan) != name()


def test_every_rank_names_the_same_file() -> None:
    names = {name(plan=DevicePlan(torch.device("cpu"), "cpu", "32-true", 2, rank)) for rank in range(2)}
    assert len(names) == 1


@pytest.mark.parametrize(
    "rows",
    [
        [("A", ROWS[0][1]), ROWS[1]],
        [ROWS[1], ROWS[0]],
        [("a", EncodedPair([1, 2], [33], [4, 5])), ROWS[1]],
        [("a", EncodedPair([1, 2], [3, 4], [5])), ROWS[1]],
        [("a", EncodedPair([1], [2, 3], [4, 5])), ROWS[1]],
        [("a", EncodedPair([1, 2], [3], [4])), ("b", EncodedPair([5, 6], [7, 8], [9]))],
    ],
    ids=["id", "order", "token", "branch", "mask", "border"],
)
def test_the_content_of_the_rows_changes_the_name(rows: list[tuple[str, EncodedPair]]) -> None:
    assert name(rows=rows) != name()


def test_the_processor_changes_the_name_on_a_cpu(machine: Path) -> None:
    before = name()
    machine.write_text("model name\t: Other CPU 1\n")
    assert name() != before
    other = name()
    machine.unlink()
    assert name() not in (before, other), "without that file Python's own name stands in"


def test_the_processor_does_not_matter_to_a_gpu(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    plan = DevicePlan(torch.device("cuda", 0), "gpu", "32-true", 1, 0)
    before = name(plan=plan)
    assert before != name(), "the device itself does"
    machine.write_text("model name\t: Other CPU 1\n")
    assert name(plan=plan) == before
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another GPU")
    assert name(plan=plan) != before


def test_the_number_of_threads_changes_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    before = name()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert name() != before


def test_a_version_changes_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    before = name()
    monkeypatch.setattr(fitting, "versions", lambda: {"torch": "2.1"})
    assert name() != before
