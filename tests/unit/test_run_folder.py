"""A run's name, its lock, and what is written before the first step."""

from __future__ import annotations

import copy
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fine_tune import run_folder
from fine_tune.errors import ConfigError, RunLocked
from fine_tune.run_folder import choose_folder, default_name, open_folder, write_config, write_manifest

CFG: dict[str, Any] = {
    "seed": 1, "run_name": None, "run_dir": None, "sweep_dir": None, "resume": None, "overwrite": False, "init_from": None,
    "hints": {}, "model": {"name": "tiny"}, "method": {"name": "qlora", "rank": 8}, "objective": {"name": "sft"},
    "data": {"name": "chat", "path": "rows.jsonl", "cache_dir": "x"}, "optim": {"lr": 1e-3}, "logger": {"csv": {}},
    "trainer": {
        "accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "num_workers": 0, "precision": "auto",
        "max_steps": 9,
    },
}  # fmt: skip


def changed(path: str, value: Any) -> dict[str, Any]:
    cfg = copy.deepcopy(CFG)
    *groups, key = path.split(".")
    node = cfg
    for group in groups:
        node = node[group]
    node[key] = value
    return cfg


def test_a_name_tells_what_was_chosen_and_is_the_same_tomorrow() -> None:
    name = default_name(CFG, "d" * 64)
    assert name.startswith("tiny-qlora-chat-sft-")
    assert name == default_name(dict(reversed(copy.deepcopy(CFG).items())), "d" * 64)
    assert len(name.rsplit("-", 1)[1]) == 8


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("logger", {"wandb": {}}), ("trainer.num_workers", 4), ("trainer.accelerator", "gpu"), ("trainer.devices", 8),
        ("trainer.num_nodes", 2), ("trainer.strategy", "ddp"), ("run_dir", "else"), ("run_name", "x"), ("sweep_dir", "s"),
        ("overwrite", True), ("resume", "r"), ("hints", {"a": "b"}), ("data.cache_dir", "y"),
    ],
)  # fmt: skip
def test_what_does_not_change_the_result_does_not_change_the_name(path: str, value: Any) -> None:
    assert default_name(changed(path, value), "d" * 64) == default_name(CFG, "d" * 64)


@pytest.mark.parametrize(
    ("path", "value"),
    [("seed", 2), ("method.rank", 16), ("optim.lr", 2e-3), ("trainer.precision", "bf16-mixed"), ("trainer.max_steps", 10),
     ("init_from", "a"), ("data.path", "other.jsonl")],
)  # fmt: skip
def test_what_changes_the_result_changes_the_name(path: str, value: Any) -> None:
    assert default_name(changed(path, value), "d" * 64) != default_name(CFG, "d" * 64)


def test_other_data_under_the_same_config_is_another_run() -> None:
    assert default_name(CFG, "d" * 64) != default_name(CFG, "e" * 64)


def occupied(folder: Path, *, finished: bool = False) -> Path:
    folder.mkdir(parents=True)
    (folder / ("summary.json" if finished else "config.yaml")).write_text("{}")
    return folder


def test_a_free_name_is_taken_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert choose_folder(CFG, "d") == (Path("runs") / default_name(CFG, "d"), None)
    sweep = changed("sweep_dir", "sweeps/a")
    assert choose_folder(sweep, "d")[0] == Path("sweeps/a") / default_name(CFG, "d")
    # An empty folder is as good as none.
    (tmp_path / "runs" / default_name(CFG, "d")).mkdir(parents=True)
    assert choose_folder(CFG, "d")[1] is None


@pytest.mark.parametrize(
    ("finished", "words"), [(True, "has this config and is finished."), (False, "go on with resume=")]
)
def test_a_second_run_of_a_config_gets_a_number_and_a_note(tmp_path: Path, finished: bool, words: str) -> None:
    cfg = changed("sweep_dir", str(tmp_path))
    first = occupied(tmp_path / default_name(CFG, "d"), finished=finished)
    folder, note = choose_folder(cfg, "d")
    assert folder == tmp_path / f"{first.name}-2"
    assert note is not None
    assert words in note
    assert note.startswith(f"{first} ")
    assert note.endswith(f"This run is {first.name}-2.")


def test_the_note_names_the_run_before_this_one(tmp_path: Path) -> None:
    cfg = changed("sweep_dir", str(tmp_path))
    name = default_name(CFG, "d")
    occupied(tmp_path / name, finished=True)
    second = occupied(tmp_path / f"{name}-2")
    folder, note = choose_folder(cfg, "d")
    assert folder.name == f"{name}-3"
    assert note is not None
    assert f"{second} has this config and was interrupted: go on with resume={second}" in note


@pytest.mark.parametrize("key", ["run_name", "run_dir"])
def test_an_explicit_folder_that_exists_is_refused_with_three_ways_on(tmp_path: Path, key: str) -> None:
    place = occupied(tmp_path / "mine")
    cfg = changed(key, "mine" if key == "run_name" else str(place)) | {"sweep_dir": str(tmp_path)}
    with pytest.raises(ConfigError) as refused:
        choose_folder(cfg, "d")
    for words in (f"{key}={cfg[key]}: {place} exists", f"resume={place}", "overwrite=true", "another name"):
        assert words in str(refused.value)
    assert choose_folder(cfg | {"overwrite": True}, "d") == (place, None)
    (place / "config.yaml").unlink()
    assert choose_folder(cfg, "d") == (place, None)
    # What a refused start leaves is no run.
    (place / run_folder.LOCK).touch()
    assert choose_folder(cfg, "d") == (place, None)


def test_overwrite_deletes_runs_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="holds no run"):
        run_folder.refuse_to_delete(tmp_path / "thesis", needed={})
    (tmp_path / "thesis" / "config.yaml").touch()
    for inside in (tmp_path / "thesis", tmp_path / "thesis" / "adapter"):
        with pytest.raises(ConfigError, match=r"init_from=.* is in the folder that would be deleted"):
            run_folder.refuse_to_delete(tmp_path / "thesis", needed={"init_from": str(inside)})
    run_folder.refuse_to_delete(tmp_path / "thesis", needed={"init_from": str(tmp_path / "other"), "data.path": None})
    with pytest.raises(ConfigError, match="is a file"):
        choose_folder(changed("run_dir", str(tmp_path / "thesis" / "text.txt")), "d")


HOLD = (
    "import sys, filelock; l = filelock.FileLock(sys.argv[1]); l.acquire(); print('held', flush=True); sys.stdin.read()"
)


def test_a_folder_in_use_is_refused_and_a_dead_owner_is_forgotten(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("kept")
    lock = str(folder / run_folder.LOCK)
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(
            RunLocked, match=r"is in use by another process\. Wait for it, or choose another run_name="
        ) as told:
            open_folder(folder)
        assert told.value.exit_code == 9
        assert (folder / "config.yaml").read_text() == "kept"
    finally:
        owner.kill()
        owner.communicate()
    opened = open_folder(folder)
    assert opened.name == "run"
    opened.close()


def test_a_closed_folder_can_be_opened_again(tmp_path: Path) -> None:
    first = open_folder(tmp_path / "a" / "run")
    first.close()
    open_folder(tmp_path / "a" / "run").close()


def test_opening_removes_what_a_killed_writer_left_and_clearing_the_rest(tmp_path: Path) -> None:
    for name in ("checkpoints/step-0000001", "checkpoints/.tmp-1-step-0000002", ".tmp-2-summary"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("old")
    opened = open_folder(tmp_path)
    found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")} - {".lock"}
    opened.close()
    assert found == {"checkpoints", "checkpoints/step-0000001", "config.yaml"}
    run_folder.clear_folder(tmp_path)
    assert {item.name for item in tmp_path.iterdir()} == {run_folder.LOCK}


def test_the_config_is_written_as_plain_data_without_secrets(tmp_path: Path) -> None:
    secret = "hf_" + "Ab1" * 11
    cfg = CFG | {"logger": {"wandb": {"api_key": "mine", "project": "p", "tags": [secret]}}}
    write_config(tmp_path, cfg)
    text = (tmp_path / "config.yaml").read_text(encoding="ascii")
    assert secret not in text
    assert "mine" not in text
    expected = copy.deepcopy(CFG) | {"logger": {"wandb": {"api_key": "***", "project": "p", "tags": ["***"]}}}
    assert yaml.safe_load(text) == expected
    assert cfg["logger"]["wandb"]["api_key"] == "mine"


def test_the_manifest_holds_what_is_needed_to_repeat_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/me/train.py"])
    overrides = ["method.rank=8", "logger.wandb.api_key=hf_" + "Ab1" * 11]
    write_manifest(tmp_path, seed=7, device="CPU", fingerprints={"base_fingerprint": "f"}, overrides=overrides[:1])
    found = json.loads((tmp_path / "manifest.json").read_text())
    assert (found["seed"], found["device"], found["base_fingerprint"]) == (7, "CPU", "f")
    assert found["command"] == "train.py method.rank=8"
    write_manifest(tmp_path, seed=7, device="CPU", fingerprints={}, overrides=["data.path=my rows.jsonl"])
    assert shlex.split(json.loads((tmp_path / "manifest.json").read_text())["command"]) == ["train.py", "data.path=my rows.jsonl"]
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "lightning", "transformers", "peft"} <= found["versions"].keys()
    write_manifest(tmp_path, seed=7, device="CPU", fingerprints={}, overrides=overrides)
    assert "hf_Ab1" not in (tmp_path / "manifest.json").read_text()


def test_the_commit_says_when_there_are_local_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"rev-parse": "a" * 40 + "\n", "status": ""}

    def run(command: list[str], **_: Any) -> Any:
        return subprocess.CompletedProcess(command, 0, stdout=answers[command[1]])

    monkeypatch.setattr(run_folder.subprocess, "run", run)
    assert run_folder.git_commit() == "a" * 40
    answers["status"] = " M train.py\n"
    assert run_folder.git_commit() == "a" * 40 + "-dirty"

    def fail(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("git")

    monkeypatch.setattr(run_folder.subprocess, "run", fail)
    assert run_folder.git_commit() is None
