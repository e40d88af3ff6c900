"""The folder that is pushed, to the byte, and what stops a push."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants

from fine_tune.cli.push import main
from fine_tune.pushing.licence import licence_of

CARRIED = {
    "adapter_model.safetensors": "weights", "adapter_config.json": '{"base_model_name_or_path": "/home/me/llama", "r": 4}',
    "fine_tune.json": '{"model": "/home/me/llama", "step": 3}', "passport.json": "{}", "tokenizer.json": "{}",
    "tokenizer_config.json": "{}", "chat_template.jinja": "x",
}  # fmt: skip
LEFT = {"README.md": "of another program", "optimizer.pt": "x", "notes.txt": "private"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "adapter").mkdir(parents=True)
    for name, text in {**CARRIED, **LEFT}.items():
        (folder / "adapter" / name).write_text(text, encoding="utf-8")
    (folder / "wandb").mkdir()
    (folder / "wandb" / "key").write_text("hf_abcdefghijklmnopqrstuvwx", encoding="utf-8")
    config = {
        "model": {"path": "/home/me/llama"},
        "method": {"name": "lora", "bits": 16},
        "data": {},
        "objective": {"name": "sft"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / "manifest.json").write_text(
        '{"command": "train.py data.path=/home/me/private/rows.jsonl"}', encoding="utf-8"
    )
    return folder


def dry(run: Path, *words: str) -> int:
    return main([f"ckpt={run}", "repo=me/model", "dry_run=true", *words])


def test_a_dry_run_writes_the_exact_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry(run) == 0
    place = run / "push" / "adapter"
    assert {file.name for file in place.iterdir()} == {*CARRIED, "README.md"}
    told = capsys.readouterr().out
    assert all(name in told for name in CARRIED)
    assert f"not pushed: this was a dry run; the folder is {place}" in told
    for name in set(CARRIED) - {"adapter_config.json", "fine_tune.json"}:
        assert (place / name).read_text(encoding="utf-8") == CARRIED[name]
    # Where somebody keeps a base is nobody's business.
    assert json.loads((place / "adapter_config.json").read_text(encoding="utf-8")) == {
        "base_model_name_or_path": "llama",
        "r": 4,
    }
    whole = "".join(file.read_text(encoding="utf-8") for file in place.iterdir())
    assert "/home/me" not in whole
    assert "hf_abc" not in whole
    assert dry(run) == 0, "it is written again"


def test_what_is_pushed_is_that_folder(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def create_repo(self, repo: str, **options: Any) -> str:
            calls.append(("create", {"repo": repo, **options}))
            return f"https://hub/{repo}"

        def upload_folder(self, **options: Any) -> None:
            files = sorted(file.name for file in Path(options["folder_path"]).iterdir())
            calls.append(("upload", {"repo_id": options["repo_id"], "files": files}))

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert main([f"ckpt={run}", "repo=me/model"]) == 0
    assert calls == [
        ("create", {"repo": "me/model", "private": True, "exist_ok": True}),
        ("upload", {"repo_id": "me/model", "files": sorted([*CARRIED, "README.md"])}),
    ]
    assert "pushed to https://hub/me/model" in capsys.readouterr().out


def test_offline_and_without_a_token_nothing_is_written(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main([f"ckpt={run}", "repo=me/model"]) == 5
    assert capsys.readouterr().err == "HF_HUB_OFFLINE is set: nothing is pushed. Unset it, or pass dry_run=true.\n"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main([f"ckpt={run}", "repo=me/model"]) == 5
    assert "no hub token" in capsys.readouterr().err
    assert not (run / "push").exists()


def test_a_file_with_a_secret_stops_the_push(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "adapter" / "tokenizer_config.json").write_text('{"x": "hf_abcdefghijklmnopqrstuvwx"}', encoding="utf-8")
    assert dry(run) == 10
    told = capsys.readouterr().err
    assert "tokenizer_config.json holds what looks like a secret" in told
    assert "hf_abc" not in told
    assert not (run / "push" / "adapter").exists()


def test_a_merged_model_is_pushed_only_if_it_is_sound(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry(run, "what=merged") == 4
    assert "Make it with fine-tune merge" in capsys.readouterr().err
    merged = run / "merged"
    merged.mkdir()
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        (merged / name).write_text("{}", encoding="utf-8")
    (merged / "merge_report.json").write_text('{"within_tolerance": false}', encoding="utf-8")
    assert dry(run, "what=merged") == 4
    (merged / "merge_report.json").write_text('{"within_tolerance": true, "base": "nf4"}', encoding="utf-8")
    assert dry(run, "what=merged") == 0
    names = {file.name for file in (run / "push" / "merged").iterdir()}
    assert names == {
        "README.md", "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "merge_report.json",
    }  # fmt: skip
    assert "`nf4`" in (run / "push" / "merged" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("repo", ["model", "me/model/x", "../model", "me/..", "-me/model", "me/mo del"])
def test_a_repo_that_is_no_hub_id_is_refused(repo: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"ckpt={run}", f"repo={repo}", "dry_run=true"]) == 2
    assert "a hub id looks like owner/name" in capsys.readouterr().err


def test_a_folder_of_something_else_is_not_overwritten(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").touch()
    assert dry(run, f"out={tmp_path / 'mine'}") == 2
    assert (tmp_path / "mine" / "diary.txt").is_file()


def test_licences_come_from_the_bases_files_first(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# x", encoding="utf-8")
    assert licence_of("meta-llama/Llama-2-7b-hf", tmp_path) == "cc-by-4.0"
    assert licence_of("meta-llama/Llama-2-7b-hf", None) == "llama2"
    assert licence_of("builtin:tiny", None) == "apache-2.0"
    assert licence_of("someone/else", tmp_path / "nowhere") is None
