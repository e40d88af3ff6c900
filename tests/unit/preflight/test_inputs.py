"""What a run reads: independent refusals come together, before a weight is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fine_tune
from fine_tune import assembly
from fine_tune.data import collect
from fine_tune.errors import ConfigError, DataError, EnvironmentProblem, SeveralProblems
from fine_tune.models import hub
from fine_tune.preflight import inputs


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(assembly, "load_network", refuse)


def rows(folder: Path) -> Path:
    file = folder / "rows.jsonl"
    file.write_text('{"instruction": "a", "output": "b"}\n{"instruction": \n', encoding="utf-8")
    return file


def test_device_model_data_and_adapter_are_told_at_once(tmp_path: Path) -> None:
    words = [
        "trainer=gpu", f"model.path={tmp_path / 'nowhere'}", "data=instructions", f"data.path={rows(tmp_path)}",
        f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    with pytest.raises(SeveralProblems) as raised:
        fine_tune.train(words)
    told = str(raised.value)
    assert raised.value.exit_code == 5
    for named in ("trainer.accelerator=gpu", "nowhere: no such folder", "rows.jsonl:2: not JSON"):
        assert named in told
    failure = json.loads((tmp_path / "run" / "failure.json").read_text(encoding="utf-8"))
    assert (failure["exit_code"], failure["error"]) == (5, "SeveralProblems")


def test_an_adapter_that_is_not_there_and_bad_rows_are_told_at_once(tmp_path: Path) -> None:
    words = [
        "trainer=cpu", "data=instructions", f"data.path={rows(tmp_path)}", f"init_from={tmp_path / 'gone'}",
        f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    with pytest.raises(SeveralProblems) as raised:
        fine_tune.train(words)
    assert raised.value.exit_code == 2
    assert "data.max_seq_len=1024: the model was made for 512" in str(raised.value)
    assert "no such folder. Pass a run" in str(raised.value)
    assert "rows.jsonl:2" in str(raised.value)


def test_one_refusal_keeps_its_own_class(tmp_path: Path) -> None:
    common = ["trainer=cpu", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        fine_tune.train([*common, "data=instructions", f"data.path={rows(tmp_path)}", "data.max_seq_len=256"])
    with pytest.raises(ConfigError, match=r"data\.max_seq_len=70000: the model was made for"):
        fine_tune.train([*common, "data.max_seq_len=70000", "trainer.micro_batch_tokens=70000"])


def test_nothing_is_fetched_or_tokenized_for_a_run_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def noting(name: str) -> Any:
        def note(*args: Any, **options: Any) -> None:
            fetched.append(name)
            raise EnvironmentProblem(f"{name} was asked for")

        return note

    monkeypatch.setattr(hub, "_download", noting("model"))
    monkeypatch.setattr(collect, "read_hub", noting("data"))
    monkeypatch.setattr(inputs, "prepared_data", noting("tokens"))
    words = ["model.path=owner/name", "model.revision=main", "data=chat", "data.hub=owner/rows", "data.revision=main"]
    with pytest.raises(EnvironmentProblem, match=r"trainer\.accelerator=gpu"):
        fine_tune.train(["trainer=gpu", *words, f"run_dir={tmp_path / 'one'}"])
    with pytest.raises(EnvironmentProblem, match=r"trainer\.accelerator=gpu"):
        fine_tune.train(["trainer=gpu", f"run_dir={tmp_path / 'two'}"])
    assert fetched == []
    with pytest.raises(EnvironmentProblem, match="model was asked for"):
        fine_tune.train(["trainer=cpu", *words, f"run_dir={tmp_path / 'three'}"])
    assert fetched == ["model"], "a model that cannot be had needs no rows"
