"""Checkpoints that exist whole or not at all, and are believed only when every byte is as it was saved."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fine_tune import checkpoints, storage
from fine_tune.checkpoints import ADAPTER_FILE, MANIFEST, TRAINER_FILE
from fine_tune.errors import CheckpointError, NonFiniteError, StorageError, UnsafeArtifact


def save(root: Path, step: int, value: float = 0.0, **record: Any) -> checkpoints.Checkpoint:
    adapter = {"lora.b": torch.full((2, 3), value + step), "lora.a": torch.arange(4.0)}
    trainer = {"step": step, "rng": {"torch": torch.get_rng_state()}, "betas": (0.9, 0.999)}
    return checkpoints.save(root, step, adapter=adapter, trainer=trainer, record=record)


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    saved = save(tmp_path, 12, val_loss=1.5, base_fingerprint="abc")
    assert saved.folder == tmp_path / "step-0000012"
    found = checkpoints.verify(saved.folder)
    assert found.step == 12
    assert found.manifest["val_loss"] == 1.5
    assert found.manifest["base_fingerprint"] == "abc"
    assert torch.equal(found.adapter()["lora.b"], torch.full((2, 3), 12.0))
    state = found.trainer_state()
    assert state["betas"] == (0.9, 0.999)
    assert torch.equal(state["rng"]["torch"], torch.get_rng_state())
    assert names(saved.folder) == [ADAPTER_FILE, MANIFEST, TRAINER_FILE]


def test_weights_are_on_disk_before_the_manifest_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    flush, write = checkpoints.sync_file, checkpoints.write_json
    monkeypatch.setattr(checkpoints, "sync_file", lambda f: (order.append(f.name), flush(f))[1])
    monkeypatch.setattr(checkpoints, "write_json", lambda f, v: (order.append(f.name), write(f, v))[1])
    rename = os.replace

    def replaced(source: Path, target: Path) -> None:
        order.append(f"-> {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(storage.os, "replace", replaced)
    save(tmp_path, 1)
    assert order == [ADAPTER_FILE, TRAINER_FILE, MANIFEST, f"-> {MANIFEST}", "-> step-0000001"]


class Killed(BaseException):
    """The process ends here."""


STAGES = [
    (checkpoints, "save_file"), (checkpoints.torch, "save"), (checkpoints, "sync_file"), (checkpoints, "sha256"),
    (checkpoints, "write_json"), (storage, "sync_file"), (storage, "sync_folder"), (storage.os, "replace"),
]  # fmt: skip


@pytest.mark.parametrize(("place", "name"), STAGES, ids=[name for _, name in STAGES])
@pytest.mark.parametrize("kind", ["killed", "full"])
def test_a_death_or_a_full_disk_at_any_stage_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, kind: str
) -> None:
    save(tmp_path, 1)

    def stop(*_: Any, **__: Any) -> None:
        raise Killed if kind == "killed" else OSError(errno.ENOSPC, "full")

    if kind == "killed":
        # A killed process tidies nothing up.
        monkeypatch.setattr(storage.shutil, "rmtree", lambda *_, **__: None)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, stop)
        with pytest.raises(Killed if kind == "killed" else StorageError):
            save(tmp_path, 2)
    monkeypatch.undo()
    newest, damaged = checkpoints.latest(tmp_path)
    assert newest is not None
    assert (newest.step, damaged) == (1, [])
    assert storage.remove_leftovers(tmp_path) == (1 if kind == "killed" else 0)
    assert names(tmp_path) == ["step-0000001"]


def test_a_weight_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(NonFiniteError, match=r"step 3: 1 tensors are not finite \(lora\.b\)") as refused:
            save(tmp_path, 3, value)
        assert refused.value.exit_code == 6
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", [ADAPTER_FILE, TRAINER_FILE])
@pytest.mark.parametrize("where", [0, 0.5, -1])
def test_one_flipped_bit_is_found(tmp_path: Path, name: str, where: float) -> None:
    folder = save(tmp_path, 1).folder
    content = bytearray((folder / name).read_bytes())
    content[int(where * len(content)) if where != -1 else -1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: missing, or its content is not what was saved"):
        checkpoints.verify(folder)
    assert checkpoints.latest(tmp_path)[0] is None


@pytest.mark.parametrize("name", [ADAPTER_FILE, TRAINER_FILE, MANIFEST])
@pytest.mark.parametrize("how", ["gone", "truncated", "empty"])
def test_a_missing_or_cut_file_is_found(tmp_path: Path, name: str, how: str) -> None:
    file = save(tmp_path, 1).folder / name
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: -20 if how == "truncated" else 0])
    with pytest.raises(CheckpointError, match=f"{name}.*Use an earlier checkpoint"):
        checkpoints.verify(file.parent)


@pytest.mark.parametrize(
    "manifest", ["[]", "{}", '{"step": "x", "files": {}}', '{"step": 1, "files": 3}', '{"step": 1, "files": {}}']
)
def test_a_manifest_of_another_form_is_no_manifest(tmp_path: Path, manifest: str) -> None:
    folder = save(tmp_path, 1).folder
    (folder / MANIFEST).write_text(manifest)
    with pytest.raises(CheckpointError, match="Use an earlier checkpoint"):
        checkpoints.verify(folder)


def test_a_bit_flipped_in_the_recorded_hash_is_found(tmp_path: Path) -> None:
    folder = save(tmp_path, 1).folder
    manifest = json.loads((folder / MANIFEST).read_text())
    entry = manifest["files"][ADAPTER_FILE]
    entry["sha256"] = ("0" if entry["sha256"][0] != "0" else "1") + entry["sha256"][1:]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=ADAPTER_FILE):
        checkpoints.verify(folder)


def test_the_latest_is_the_highest_step_whatever_the_clock_says(tmp_path: Path) -> None:
    for step, seconds in ((2, 3_000), (10, 1_000), (9, 2_000)):
        folder = save(tmp_path, step).folder
        os.utime(folder, (seconds, seconds))
    # Seven digits sort as text; more do not.
    save(tmp_path, 12_345_678)
    assert checkpoints.latest(tmp_path)[0].step == 12_345_678  # type: ignore[union-attr]
    shutil.rmtree(tmp_path / "step-12345678")
    newest, damaged = checkpoints.latest(tmp_path)
    assert newest is not None
    assert (newest.step, damaged) == (10, [])


def test_a_damaged_newest_is_told_and_an_earlier_one_taken(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2).folder / ADAPTER_FILE).write_bytes(b"")
    (tmp_path / "step-final").mkdir()
    newest, damaged = checkpoints.latest(tmp_path)
    assert newest is not None
    assert newest.step == 1
    assert len(damaged) == 1
    assert "step-0000002" in damaged[0]


def test_a_manifest_of_another_step_is_found(tmp_path: Path) -> None:
    folder = save(tmp_path, 8).folder
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"step": 9}))
    with pytest.raises(CheckpointError, match="of step 9"):
        checkpoints.verify(folder)


def test_a_run_whose_folder_is_gone_is_not_made_again(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is gone, and step 4 is not saved"):
        save(tmp_path / "run" / "checkpoints", 4)
    assert names(tmp_path) == []


def test_no_folder_means_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoints.latest(tmp_path / "nowhere") == (None, [])


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


def restamp(folder: Path) -> None:
    """Make the manifest agree with the files, as whoever tampered with them would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in (ADAPTER_FILE, TRAINER_FILE):
        manifest["files"][name] = {"sha256": storage.sha256(folder / name), "bytes": (folder / name).stat().st_size}
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("form", ["torch", "raw"])
def test_code_in_a_well_stamped_checkpoint_does_not_run(tmp_path: Path, form: str) -> None:
    folder, canary = save(tmp_path / "root", 1).folder, tmp_path / "canary"
    if form == "torch":
        torch.save({"step": 1, "optimizer": Evil(canary)}, folder / TRAINER_FILE)
    else:
        (folder / TRAINER_FILE).write_bytes(pickle.dumps(Evil(canary), protocol=2))
    restamp(folder)
    found = checkpoints.verify(folder)
    with pytest.raises(UnsafeArtifact, match="holds more than plain tensors; it is not loaded") as refused:
        found.trainer_state()
    assert refused.value.exit_code == 10
    assert not canary.exists()
    # The canary sings when somebody does unpickle it.
    content = (folder / TRAINER_FILE).read_bytes()
    if form == "torch":
        with zipfile.ZipFile(folder / TRAINER_FILE) as archive:
            content = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    pickle.loads(content)
    assert canary.exists()


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step)
    assert checkpoints.prune(tmp_path, 6, keep=2, best_step=3) == [1, 2, 4]
    assert [c.step for c in checkpoints.valid_checkpoints(tmp_path)[0]] == [3, 5, 6]
    assert checkpoints.prune(tmp_path, 6, keep=2, best_step=None) == [3]
    assert checkpoints.prune(tmp_path, 6, keep=9, best_step=None) == []


def test_nothing_is_deleted_while_the_newest_is_damaged(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step-0000003" / TRAINER_FILE).write_bytes(b"")
    with pytest.raises(CheckpointError, match="step-0000003"):
        checkpoints.prune(tmp_path, 3, keep=1, best_step=None)
    assert len(names(tmp_path)) == 3


def test_a_later_damaged_checkpoint_does_not_stop_an_earlier_one_from_being_saved(tmp_path: Path) -> None:
    for step in (1, 2, 6):
        save(tmp_path, step)
    (tmp_path / "step-0000006" / TRAINER_FILE).write_bytes(b"")
    save(tmp_path, 3)
    assert checkpoints.prune(tmp_path, 3, keep=1, best_step=None) == [1, 2]
    assert checkpoints.latest(tmp_path)[0].step == 3  # type: ignore[union-attr]
    save(tmp_path, 6)
    assert checkpoints.latest(tmp_path)[0].step == 6  # type: ignore[union-attr]


def test_a_deletion_cut_short_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def die(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(checkpoints.shutil, "rmtree", die)
    with pytest.raises(Killed):
        checkpoints.prune(tmp_path, 2, keep=1, best_step=None)
    monkeypatch.undo()
    assert not (tmp_path / "step-0000001" / MANIFEST).exists()
    assert [c.step for c in checkpoints.valid_checkpoints(tmp_path)[0]] == [2]
