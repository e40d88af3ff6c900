"""Packages, places and disk, judged from the config alone."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fine_tune.config import check_config
from fine_tune.errors import EnvironmentProblem, StorageError
from fine_tune.memory.shape import LinearShape, ModelShape, UnknownShape
from fine_tune.models.hub import BUILTIN
from fine_tune.preflight import machine
from fine_tune.preflight.machine import check_disk, check_packages, check_places, num_trained

TINY = BUILTIN["builtin:tiny"]


def config(*words: str) -> dict[str, Any]:
    return check_config(["trainer=cpu", *words]).cfg


def absent(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    there = machine.find_spec
    monkeypatch.setattr(machine, "find_spec", lambda name: None if name in packages else there(name))


def test_every_missing_package_is_named_with_the_key_that_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config("optim=paged_adamw_8bit", "logger=wandb")
    check_packages(cfg)
    absent(monkeypatch, "bitsandbytes", "wandb")
    with pytest.raises(EnvironmentProblem, match=r"not installed: bitsandbytes \(optim\), wandb \(logger.wandb\).*pip install"):
        check_packages(cfg)
    with pytest.raises(EnvironmentProblem, match=r"bitsandbytes \(method=qlora\)"):
        check_packages(config())
    check_packages(config("method=lora"))


def test_a_cache_that_is_a_file_is_refused_by_its_key(tmp_path: Path) -> None:
    file = tmp_path / "cache"
    file.write_text("")
    with pytest.raises(StorageError, match=r"data\.cache_dir=.*is a file\. Name a folder"):
        check_places(config(f"data.cache_dir={file}"))
    with pytest.raises(StorageError, match=r"objective\.reference_store=.*is a file"):
        check_places(config("objective=dpo", f"objective.reference_store={file / 'below'}"))
    check_places(config(f"data.cache_dir={tmp_path / 'new'}"))


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "access", lambda place, mode: False)
    with pytest.raises(StorageError, match=r"data\.cache_dir=.*cannot be written"):
        check_places(config(f"data.cache_dir={tmp_path}"))


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def has_free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(10**12, 0, num_bytes))


def needed(monkeypatch: pytest.MonkeyPatch, cfg: dict[str, Any], folder: Path) -> float:
    """What the refusal says is needed, in GB, on a full disk."""
    has_free(monkeypatch, 0)
    with pytest.raises(StorageError) as raised:
        check_disk(cfg, TINY, folder)
    return float(str(raised.value).partition("needs ")[2].partition(" GB")[0])


def test_the_disk_must_hold_the_checkpoints_that_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config("method.rank=512")
    per_layer = num_trained(cfg["method"], machine.read_shape(TINY))
    saver = cfg["callbacks"]["checkpoint"]
    expected = 12 * per_layer * (saver["keep"] + saver["keep_best"] + 1) + 4 * per_layer + 64e6
    assert needed(monkeypatch, cfg, tmp_path / "new") == pytest.approx(expected / 1e9, abs=0.006)
    has_free(monkeypatch, int(expected))
    check_disk(cfg, TINY, tmp_path / "new")
    has_free(monkeypatch, int(expected) - 1)
    with pytest.raises(StorageError, match=r"are free\. Free space, lower callbacks\.checkpoint\.keep"):
        check_disk(cfg, TINY, tmp_path / "new")


def test_more_checkpoints_need_more_and_8_bit_moments_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("method.rank=512", "callbacks.checkpoint.keep=2")
    plain = needed(monkeypatch, config(*words), tmp_path)
    many = needed(monkeypatch, config("method.rank=512", "callbacks.checkpoint.keep=9"), tmp_path)
    small = needed(monkeypatch, config(*words, "optim=paged_adamw_8bit"), tmp_path)
    assert small < plain < many


def test_checkpoints_that_are_there_already_are_not_needed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config("method.rank=512")
    before = needed(monkeypatch, cfg, tmp_path)
    held = tmp_path / "checkpoints" / "step-0000001"
    held.mkdir(parents=True)
    (held / "trainer.pt").write_bytes(bytes(30_000_000))
    assert needed(monkeypatch, cfg, tmp_path) == pytest.approx(before - 0.03, abs=0.006)


def test_a_model_of_unknown_shape_needs_room_for_the_small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: Any, **options: Any) -> None:
        raise UnknownShape("odd")

    monkeypatch.setattr(machine, "read_shape", unknown)
    assert needed(monkeypatch, config("method.rank=512"), tmp_path) == pytest.approx(0.064, abs=0.006)


def test_trained_weights_are_counted_as_peft_makes_them() -> None:
    linears = (LinearShape("model.layers.0.self_attn.q_proj", 8, 8, 0), LinearShape("model.layers.0.mlp.up_proj", 8, 20, 1))
    shape = ModelShape(linears, num_layers=3, hidden=8, attention=8, heads=2, vocabulary=10, other=100)
    method = copy.deepcopy(config()["method"]) | {"rank": 4}
    assert num_trained({**method, "target_modules": "all-linear"}, shape) == 3 * 4 * (16 + 28)
    assert num_trained({**method, "target_modules": ["q_proj"]}, shape) == 3 * 4 * 16
    assert num_trained({**method, "trains": "all"}, shape) == 3 * (64 + 160) + 100
