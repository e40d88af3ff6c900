"""The demo: base, SFT, DPO, verdict and report in one command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import fine_tune
from fine_tune.cli import demo
from fine_tune.config import check_config
from fine_tune.evaluation_config import check_evaluation


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the demo asks for, in order; trainings leave what finished ones leave."""
    from fine_tune.report import page

    calls: list[Any] = []

    def train(words: list[str]) -> dict[str, Any]:
        calls.append(("train", words))
        folder = Path(check_config(words).cfg["run_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").touch()
        (folder / "summary.json").touch()
        return {}

    def report(run: Path, out: Path | None = None, *, others: Any = ()) -> Path:
        calls.append(("report", run, list(others)))
        assert out is not None
        return out

    monkeypatch.setattr(fine_tune, "train", train)
    monkeypatch.setattr(fine_tune, "evaluate", lambda words: calls.append(("evaluate", words)))
    monkeypatch.setattr(page, "write_report", report)
    return calls


# Names that a home folder or a person may have.
@pytest.mark.parametrize("name", ["demo", "my demo", "d\u00e9mo", "a,b", "a(1)", "it's", "[x]", "a=b"])
def test_the_demo_tells_a_story_that_every_part_accepts(name: str, tmp_path: Path, told: list[Any]) -> None:
    sft, dpo = tmp_path / name / "sft", tmp_path / name / "dpo"
    assert demo.demo(tmp_path / name) == tmp_path / name / "report.html"
    assert [call[0] for call in told] == ["train", "train", "evaluate", "evaluate", "report"]
    first, second = (check_config(call[1]).cfg for call in told[:2])
    assert (first["run_dir"], first["init_from"], first["objective"]["name"]) == (str(sft), None, "sft")
    assert (second["run_dir"], second["init_from"], second["objective"]["name"]) == (str(dpo), str(sft), "dpo")
    asked = [check_evaluation(call[1]) for call in told[2:4]]
    assert [(cfg["ckpt"], cfg["eval"]["name"]) for cfg in asked] == [
        (["base", str(sft), str(dpo)], "exact_match"),
        ([str(sft), str(dpo)], "preference"),
    ]
    assert told[4] == ("report", dpo, [sft])


def test_the_demo_goes_on_where_it_stopped(tmp_path: Path, told: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (tmp_path / "sft", tmp_path / "dpo"):
        folder.mkdir()
        (folder / "config.yaml").touch()
    (tmp_path / "sft" / "summary.json").touch()
    resumed: list[list[str]] = []
    monkeypatch.setattr(fine_tune, "train", resumed.append)
    demo.demo(tmp_path)
    assert [call[0] for call in told] == ["evaluate", "evaluate", "report"]
    assert [[word.replace("'", "") for word in words] for words in resumed] == [[f"resume={tmp_path / 'dpo'}"]]


def test_the_demos_words(tmp_path: Path, told: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main([f"out={tmp_path / 'x'}", "open=false"]) == 0
    assert capsys.readouterr().out.endswith(f"the report: {tmp_path / 'x' / 'report.html'}\n")
    told.clear()
    assert demo.main(["open=perhaps"]) == 2
    assert "open=perhaps: not for demo. It takes out=<folder> and open=true or open=false." in capsys.readouterr().err
    assert told == []


@pytest.mark.drill
@pytest.mark.timeout(900)
def test_the_whole_demo_ends_in_a_verdict_within_five_minutes(repository: Path, tmp_path: Path) -> None:
    """As a person runs it, on two cores with nothing else to do; again, nothing is trained a second time."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    command = [sys.executable, "-m", "fine_tune", "demo", f"out={tmp_path / 'demo'}"]
    options: dict[str, Any] = {
        "cwd": repository,
        "env": environment,
        "capture_output": True,
        "text": True,
        "check": True,
    }
    started = time.monotonic()
    first = subprocess.run(command, **options)
    assert time.monotonic() - started < 300
    report = tmp_path / "demo" / "report.html"
    assert first.stdout.endswith(f"the report: {report}\n")
    verdicts = json.loads((tmp_path / "demo/dpo/eval/exact_match/verdict.json").read_text(encoding="utf-8"))
    assert [verdict["names"] for verdict in verdicts] == [["base", "sft"], ["sft", "dpo"], ["base", "dpo"]]
    assert verdicts[0]["word"] == "better"
    assert verdicts[0]["p"] < 1e-6
    text = report.read_text(encoding="utf-8")
    assert all(verdict["sentence"] in text for verdict in verdicts)
    [preferred] = json.loads((tmp_path / "demo/dpo/eval/preference/verdict.json").read_text(encoding="utf-8"))
    assert (preferred["names"], preferred["word"]) == (["sft", "dpo"], "better")
    trained = {file: file.stat().st_mtime_ns for file in (tmp_path / "demo").glob("*/adapter/*")}
    again = subprocess.run(command, **options)
    assert "items are there already" in again.stdout
    assert trained == {file: file.stat().st_mtime_ns for file in (tmp_path / "demo").glob("*/adapter/*")}
