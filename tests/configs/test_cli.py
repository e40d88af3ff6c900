"""From the command line to a run: the job gets what was checked, and Hydra leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import fine_tune
from fine_tune.cli import main as verbs
from fine_tune.cli.train import main
from fine_tune.config import check_config, find_conf_dir
from fine_tune.errors import DataError
from fine_tune.interrupts import Interrupted


class Recorder:
    """Stands in for the run; keeps what it was given and ends as told."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.ends: list[int | BaseException] = []

    def run(self, cfg: dict[str, Any], *, overrides: list[str], **_: Any) -> SimpleNamespace:
        self.calls.append({"cfg": cfg, "overrides": overrides, "argv": list(sys.argv), "cwd": Path.cwd()})
        end = self.ends.pop(0) if self.ends else 0
        if isinstance(end, BaseException):
            raise end
        return SimpleNamespace(summary={"steps": len(self.calls)}, run_dir="runs/x")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recorder:
    made = Recorder()
    # A sweep's jobs have imported the function by its name.
    monkeypatch.setattr("fine_tune.sweeps.jobs.run", made.run)
    module = ModuleType("fine_tune.runs")
    module.run = made.run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fine_tune.runs", module)
    monkeypatch.setattr(sys, "argv", ["train.py", "typed=by-user"])
    monkeypatch.chdir(tmp_path)
    return made


def test_a_single_run_gets_the_checked_config(recorder: Recorder, tmp_path: Path) -> None:
    overrides = ["model=qwen", "data=oasst1", "data.path=rows.jsonl", "trainer.max_steps=5", "run_name=a"]
    assert main(overrides) == 0
    [call] = recorder.calls
    assert call["cfg"] == check_config(overrides).cfg
    assert call["overrides"] == overrides
    assert call["cwd"] == tmp_path
    # Lightning starts the other processes of DDP from sys.argv, so the job must see it as it was typed.
    assert call["argv"] == sys.argv == ["train.py", "typed=by-user"]
    assert list(tmp_path.iterdir()) == []


def test_the_words_lightning_adds_for_ddp_are_taken(recorder: Recorder) -> None:
    added = ['hydra.run.dir="."', "hydra.job.name=train_ddp_process_1", "hydra.output_subdir=null"]
    assert main(["seed=3", *added]) == 0
    assert recorder.calls[0]["cfg"]["seed"] == 3


@pytest.mark.parametrize(
    ("end", "code"),
    [(Interrupted(signal.SIGTERM, "stopped"), 143), (DataError("rows.jsonl: no rows."), 3), (KeyboardInterrupt(), 130)],
)
def test_the_exit_code_is_the_runs(
    recorder: Recorder, capsys: pytest.CaptureFixture[str], end: int | BaseException, code: int
) -> None:
    recorder.ends = [end]
    assert main([]) == code
    printed = capsys.readouterr().err
    assert ("rows.jsonl: no rows." in printed) == (code == 3)
    assert "Traceback" not in printed


def test_a_sweep_runs_every_combination_and_leaves_no_file(recorder: Recorder, tmp_path: Path) -> None:
    assert main(["-m", "method.rank=8,16", "optim.lr=1e-4", "sweep_dir=all"]) == 0
    seen = [(call["cfg"]["method"]["rank"], call["cfg"]["optim"]["lr"]) for call in recorder.calls]
    assert seen == [(8, 1e-4), (16, 1e-4)]
    assert {call["cfg"]["sweep_dir"] for call in recorder.calls} == {"all"}
    assert recorder.calls[0]["overrides"] == ["method.rank=8", "optim.lr=1e-4", "sweep_dir=all"]
    # Nothing but the sweep's own record, in the folder that was named.
    assert [path.name for path in tmp_path.iterdir()] == ["all"]
    assert [path.name.split("-")[0] for path in (tmp_path / "all").iterdir()] == ["sweep"]
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_a_failed_job_does_not_stop_the_sweep_and_decides_its_exit_code(
    recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder.ends = [DataError("rows.jsonl: no rows."), 0]
    assert main(["-m", "seed=1,2"]) == 3
    assert [call["cfg"]["seed"] for call in recorder.calls] == [1, 2]
    assert "rows.jsonl: no rows." in capsys.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_job_ends_its_sweep(recorder: Recorder, signum: signal.Signals) -> None:
    recorder.ends = [Interrupted(signum, "stopped"), 0]
    assert main(["-m", "seed=1,2"]) == 128 + signum
    assert len(recorder.calls) == 1


def test_no_job_starts_when_one_combination_is_wrong(
    recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["-m", "method.rank=8,0"]) == 2
    assert recorder.calls == []
    assert "method.rank = 0: must be >= 1" in capsys.readouterr().err


def test_python_gets_the_summary_and_the_errors(recorder: Recorder) -> None:
    assert fine_tune.train(["seed=4"]) == {"steps": 1}
    assert recorder.calls[0]["cfg"]["seed"] == 4
    stops = [Interrupted(number, "stopped") for number in (signal.SIGINT, signal.SIGTERM)]
    recorder.ends = [DataError("no rows"), *stops]
    with pytest.raises(DataError, match="no rows"):
        fine_tune.train()
    with pytest.raises(KeyboardInterrupt):
        fine_tune.train()
    with pytest.raises(Interrupted, match="stopped"):
        fine_tune.train()


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--cfg", "job", "-p", "optim", "optim.lr=5e-5"], "lr: 5.0e-05"),
        (["--help"], "the built-in job"),
    ],
)
def test_hydra_shows_configs_without_running(
    recorder: Recorder, capsys: pytest.CaptureFixture[str], words: list[str], shown: str
) -> None:
    assert main(words) == 0
    assert shown in capsys.readouterr().out
    assert recorder.calls == []


@pytest.mark.parametrize(
    "flag", ["--experimental-rerun", "--config-path=x", "--config-name", "-cd", "--epochs"]
)
def test_other_flags_are_refused(recorder: Recorder, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert main([flag, "x"]) == 2
    assert f"{flag.partition('=')[0]}: not a flag of train" in capsys.readouterr().err
    assert recorder.calls == []


@pytest.mark.parametrize(
    ("words", "code", "stream", "shown"),
    [
        ([], 2, "err", "verbs:"),
        (["-h"], 0, "out", "train"),
        (["trian"], 2, "err", "Did you mean train?"),
    ],
)
def test_the_console_script_lists_its_verbs(
    capsys: pytest.CaptureFixture[str], words: list[str], code: int, stream: str, shown: str
) -> None:
    assert verbs.main(words) == code
    assert shown in getattr(capsys.readouterr(), stream)


def test_the_console_script_hands_over_to_the_verb(recorder: Recorder) -> None:
    assert verbs.main(["train", "seed=5"]) == 0
    assert recorder.calls[0]["cfg"]["seed"] == 5


def test_configs_are_found_in_a_clone_and_first_inside_a_package(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_conf_dir() == repository / "conf"
    package = tmp_path / "site" / "fine_tune"
    for folder in (package / "conf", tmp_path / "site" / "conf"):
        folder.mkdir(parents=True)
        (folder / "train.yaml").touch()
    monkeypatch.setattr("fine_tune.config.__file__", str(package / "config.py"))
    assert find_conf_dir() == package / "conf"


def test_configs_are_found_from_any_folder(tmp_path: Path, repository: Path) -> None:
    ended = subprocess.run(
        [sys.executable, str(repository / "train.py"), "--cfg", "job", "-p", "model"],
        capture_output=True, text=True, cwd=tmp_path, check=True,
    )  # fmt: skip
    assert "path: builtin:tiny" in ended.stdout


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("fine_tune.cli.train.check_config", ["train", "trainer=cpu"]),
        ("fine_tune.cli.train._sweep", ["train", "-m", "sweep=lr"]),
        ("fine_tune.cli.report._read", ["report", "runs/sft"]),
        ("fine_tune.cli.demo.demo", ["demo"]),
    ],
)
@pytest.mark.parametrize("said", ["", "stopped after step 3 and saved"])
def test_ctrl_c_never_ends_without_a_word(
    place: str, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt(*[said] if said else [])

    monkeypatch.setattr(place, interrupted)
    assert verbs.main(words) == 130
    assert capsys.readouterr().err == (said or "stopped by Ctrl-C") + "\n"
