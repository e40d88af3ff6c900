"""Files that somebody else wrote: code in them does not run, and lies in them are found before anything is believed."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fine_tune import checkpoints, safe_load, storage
from fine_tune.cli.verb import run_verb
from fine_tune.data.cache import find as find_entry
from fine_tune.data.prepared import Prepared
from fine_tune.errors import CheckpointError, ConfigError, EnvironmentProblem, FineTuneError, UnsafeArtifact
from fine_tune.evaluation.record import Record
from fine_tune.models.adapter import load_initial_adapter
from fine_tune.models.adapter_source import find_adapter
from fine_tune.models.base import BaseSpec, load_base
from fine_tune.models.fingerprint import base_fingerprint
from fine_tune.models.hub import resolve_model
from fine_tune.models.tokenizer import load_tokenizer

from .hostile import HEADERS, Evil, safetensors, sings, states

BASE = Path(checkpoints.__file__).parent / "world" / "base"


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def checkpoint(root: Path, state: Any) -> Path:
    """A checkpoint whose trainer state is something else, and whose manifest agrees with it."""
    made = checkpoints.save(root, 1, adapter={"b": torch.zeros(2)}, trainer={}, record={}).folder
    torch.save(state, made / checkpoints.TRAINER_FILE)
    manifest = json.loads((made / checkpoints.MANIFEST).read_text())
    manifest["files"][checkpoints.TRAINER_FILE] = {"sha256": storage.sha256(made / checkpoints.TRAINER_FILE)}
    (made / checkpoints.MANIFEST).write_text(json.dumps(manifest))
    return made


@pytest.mark.parametrize("where", states(Path("x")))
def test_code_anywhere_in_a_trainer_state_does_not_run(tmp_path: Path, canary: Path, where: str) -> None:
    made = checkpoint(tmp_path / "run", states(canary)[where])
    found, damaged = checkpoints.latest(tmp_path / "run")
    assert (found is not None, damaged) == (True, [])
    with pytest.raises(UnsafeArtifact) as refused:
        found.trainer_state()  # type: ignore[union-attr]
    assert refused.value.exit_code == 10
    assert not canary.exists()
    with zipfile.ZipFile(made / checkpoints.TRAINER_FILE) as archive:
        content = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    if where not in ("in the optimizer",):  # tensors of it are in files of their own, which plain pickle cannot find
        assert sings(content, canary)


def test_a_sound_trainer_state_is_read(tmp_path: Path) -> None:
    made = checkpoint(tmp_path, {"step": 1, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}})
    assert checkpoints.verify(made).trainer_state()["step"] == 1


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_weights_in_a_pickle_are_refused_wherever_they_are_looked_for(tmp_path: Path, canary: Path, form: str) -> None:
    def write(file: Path) -> None:
        file.parent.mkdir(parents=True)
        torch.save(Evil(canary), file) if form == "torch" else file.write_bytes(pickle.dumps(Evil(canary), protocol=2))

    write(tmp_path / "adapter" / "adapter_model.bin")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"r": 4}')
    with pytest.raises(UnsafeArtifact, match=r"adapter_model\.bin is a pickle file"):
        find_adapter(tmp_path / "adapter", key="ckpt")
    # Under the name of another format.
    write(tmp_path / "renamed" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="damaged or missing"):
        load_initial_adapter(torch.nn.Linear(1, 1), tmp_path / "renamed", "0")
    for name in ("pytorch_model.bin", "model.safetensors"):
        write(tmp_path / name.split(".")[0] / name)
        shutil.copy(BASE / "config.json", tmp_path / name.split(".")[0])
        with pytest.raises(CheckpointError):
            base_fingerprint(tmp_path / name.split(".")[0])
        with pytest.raises(EnvironmentProblem):
            load_base(BaseSpec(tmp_path / name.split(".")[0], 16, torch.float32, torch.float32, torch.device("cpu")))
    assert not canary.exists()


def test_code_in_a_cache_or_an_evaluation_does_not_run(tmp_path: Path, canary: Path) -> None:
    evil = pickle.dumps(Evil(canary), protocol=2)
    entry = tmp_path / "cache" / "key"
    entry.mkdir(parents=True)
    for name in ("train.arrow", "val.arrow", "eval_items.json", "ledger.json", "pairs.json"):
        (entry / name).write_bytes(evil)
    hashes = {file.name: storage.sha256(file) for file in entry.iterdir()}
    (entry / "manifest.json").write_text(json.dumps({"sha256": hashes}))
    assert find_entry(tmp_path / "cache", "key") == entry
    with pytest.raises((ValueError, OSError)):
        Prepared.open(entry, "fingerprint")

    folder = tmp_path / "eval"
    folder.mkdir()
    for name in ("key.json", "metrics.json", "items.jsonl", "partial.jsonl", "progress.jsonl"):
        (folder / name).write_bytes(evil)
    record = Record(folder, {"seed": 0}, "correct")
    assert record.finished() is None
    assert record.start([[0], [1]]) == {}
    assert not canary.exists()
    assert sings(evil, canary)


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(HEADERS[name])
    shutil.copy(BASE / "config.json", tmp_path)
    for read in (safe_load.tensors, safe_load.opened_tensors, lambda file: base_fingerprint(file.parent)):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged or missing"):
            read(file)


def test_a_header_that_does_not_lie_is_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}))
    assert safe_load.tensors(file)["a"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", "3", '"x"', "\ufffe", ""])
def test_settings_that_are_no_object_are_refused(tmp_path: Path, text: str) -> None:
    for name in ("config.json", "adapter_config.json", "fine_tune.json", "manifest.json"):
        (tmp_path / name).write_text(text)
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").rename(tmp_path / "settings.json")
    for read in (
        lambda: resolve_model(str(tmp_path)),
        lambda: base_fingerprint(tmp_path),
        lambda: load_initial_adapter(torch.nn.Linear(1, 1), tmp_path, "0"),
        lambda: checkpoints.verify(tmp_path),
    ):
        with pytest.raises((CheckpointError, EnvironmentProblem)):
            read()
    assert Record(tmp_path, {}, None).finished() is None


def test_a_link_out_of_an_adapters_folder_is_refused(tmp_path: Path) -> None:
    private = tmp_path / "private.json"
    private.write_text("{}")
    for name in ("adapter_model.safetensors", "tokenizer_config.json"):
        folder = tmp_path / name
        folder.mkdir()
        save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(private)
        with pytest.raises(UnsafeArtifact, match=rf"{name} is a link to .*private\.json, outside the folder"):
            find_adapter(folder, key="init_from")


def test_links_of_the_hubs_cache_and_inside_a_folder_are_followed(tmp_path: Path) -> None:
    folder, blobs = tmp_path / "models--o--n" / "snapshots" / "abc", tmp_path / "models--o--n" / "blobs"
    for place in (folder, blobs):
        place.mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, blobs / "0123")
    (folder / "adapter_model.safetensors").symlink_to(Path("../../blobs/0123"))
    (folder / "again.safetensors").symlink_to("adapter_model.safetensors")
    assert find_adapter(folder, key="ckpt")[0] == folder / "adapter_model.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BASE, tmp_path / "model"))


def amend(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("where", ["model", "tokenizer", "kernel", "kernel inside"])
def test_code_of_a_models_folder_does_not_run_and_the_key_is_named(model: Path, canary: Path, where: str) -> None:
    (model / "code.py").write_text(f"from pathlib import Path\nPath({str(canary)!r}).touch()\nclass C: ...\nclass M: ...\n")
    if where == "model":
        amend(model / "config.json", model_type="mystery", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    elif where == "tokenizer":
        amend(model / "tokenizer_config.json", tokenizer_class="C", auto_map={"AutoTokenizer": ["code.C", None]})
    else:
        change = {"attn_implementation": "owner/kernel"}
        amend(model / "config.json", **(change if where == "kernel" else {"text_config": change}))
    with pytest.raises(UnsafeArtifact, match=r"model\.trust_remote_code=true") as refused:
        resolve_model(str(model))
    assert refused.value.exit_code == 10
    # And should nobody have looked: the loaders themselves run nothing.
    spec = BaseSpec(model, 16, torch.float32, torch.float32, torch.device("cpu"))
    for load in () if where == "kernel inside" else (lambda: load_tokenizer(model), lambda: load_base(spec)):
        with suppress(FineTuneError):
            load()
    assert not canary.exists()
    assert "code" not in sys.modules or not str(getattr(sys.modules["code"], "__file__", "")).startswith(str(model))


def test_an_adapter_beside_a_models_weights_does_not_sneak_in(model: Path, canary: Path) -> None:
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(BASE)}))
    torch.save(Evil(canary), model / "adapter_model.bin")
    with pytest.raises(ConfigError, match="an adapter lies in that folder"):
        resolve_model(str(model))
    assert not canary.exists()


def test_an_error_acts_on_no_terminal_and_tells_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: Exception) -> int:
        def action(words: list[str]) -> None:
            raise error

        return run_verb(["x"], "usage", action)

    token = "hf_" + "Zq7" * 11
    hostile = f"a \x1b[31mred\x1b]8;;http://x\x07 \u202eb https://me:hunter2@host/x token={token}"
    assert fail(CheckpointError(hostile)) == 4
    assert fail(RuntimeError(hostile)) == 1
    told = capsys.readouterr().err
    assert not {"\x1b", "\x07", "\u202e"} & set(told)
    assert r"\x1b[31mred" in told
    assert "hunter2" not in told
    assert token not in told
    unexpected = told[told.index("unexpected error") :]
    assert "RuntimeError" in unexpected
    assert len(unexpected.splitlines()) <= 15
