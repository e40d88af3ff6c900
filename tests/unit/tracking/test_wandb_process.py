"""W&B's process: what it is given, what it asks of wandb, and that it never outlives its run for long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fine_tune.tracking.context import Ending, RunContext
from fine_tune.tracking.safe_files import safe_files
from fine_tune.tracking.wandb_tracker import WandbTracker, process_environment

KEY = "0123456789abcdef" * 2 + "01234567"
# A wandb that writes down what it is asked, and fails or hangs where FAKE says so.
FAKE = '''
import json, os, time
from types import SimpleNamespace

print("wandb: something that is no answer")
HERE = os.path.dirname(__file__)
PLAN = json.load(open(os.path.join(HERE, "plan.json")))

def note(*what):
    with open(os.path.join(HERE, "asked.jsonl"), "a") as stream:
        stream.write(json.dumps(what, default=vars) + "\\n")
    if PLAN.get(what[0]) == "hang":
        time.sleep(60)
    if PLAN.get(what[0]) == "raise":
        raise RuntimeError(f"refused: key {os.environ.get('WANDB_API_KEY')}")

class Settings:
    def __init__(self, **values):
        self.__dict__.update(values)

class Run:
    def __init__(self, name, folder):
        self.name, self.summary = name, {}
        self.settings = SimpleNamespace(sync_dir=os.path.join(folder, "wandb", "offline-run-1"))
    def log(self, numbers, step):
        note("log", numbers, step)
    def log_artifact(self, artifact, aliases):
        note("artifact", artifact.name, artifact.type, artifact.files, aliases)
    def finish(self, exit_code):
        note("finish", exit_code, self.summary)

class Table:
    def __init__(self, columns, data):
        self.columns, self.data = columns, data

class Artifact:
    def __init__(self, name, type, metadata):
        self.name, self.type, self.files = name, type, []
    def add_file(self, path, name, skip_cache):
        self.files.append(name)

def init(**about):
    mode = about["settings"].mode
    note(f"init {mode}", {k: v for k, v in about.items() if k != "settings"}, sorted(os.environ), vars(about["settings"]))
    return Run(about["name"], about["settings"].root_dir)
'''


class Wandb:
    """A stand-in for the package, in a folder that only W&B's process looks into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "fake"
        self.folder.mkdir()
        (self.folder / "wandb.py").write_text(FAKE)
        self.plan()

    def plan(self, **what: str) -> None:
        (self.folder / "plan.json").write_text(json.dumps({key.replace("_", " "): value for key, value in what.items()}))

    def asked(self, first: str) -> list[list[Any]]:
        file = self.folder / "asked.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        return [line[1:] for line in lines if line[0] == first]


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wandb:
    fake = Wandb(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(fake.folder))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "Ab1" * 11)
    return fake


def context(tmp_path: Path, **cfg: Any) -> RunContext:
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    return RunContext(run, "abc", {"method": {"trains": "adapter", "rank": 8}, **cfg}, 0)


def test_a_run_is_opened_told_and_ended(wandb: Wandb, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_model.safetensors", "passport.json", "trainer.pt", "weights.bin", ".hidden.json"):
        (adapter / name).write_text("x")
    (adapter / "link.json").symlink_to(adapter / "passport.json")
    tracker = WandbTracker("p", tags=["a"], group="sweep-1", finish_seconds=3)
    assert tracker.start(context(tmp_path)) is None
    tracker.log(4, {"train/loss": 1.5})
    tracker.rows("previews", 4, [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}])
    tracker.finish(Ending({"exact_match": 0.5}, adapter, True, 9))
    ((about, environment, settings),) = wandb.asked("init online")
    assert about == {
        "project": "p", "entity": None, "tags": ["a"], "group": "sweep-1", "job_type": "train", "id": "abc", "name": "run",
        "config": {"method": {"trains": "adapter", "rank": 8}}, "resume": "allow",
    }  # fmt: skip
    assert "WANDB_API_KEY" in environment
    assert "HF_TOKEN" not in environment
    assert settings["root_dir"] == str(tmp_path / "run")
    for off in ("disable_git", "disable_code", "x_disable_meta", "x_disable_stats", "x_disable_machine_info"):
        assert settings[off] is True
    assert (settings["console"], settings["save_code"], settings["x_save_requirements"]) == ("off", False, False)
    assert wandb.asked("log") == [
        [{"train/loss": 1.5}, 4],
        [{"previews": {"columns": ["prompt", "completion"], "data": [["a", "b"], ["c", "d"]]}}, 4],
    ]
    files = ["adapter_model.safetensors", "passport.json"]
    assert wandb.asked("artifact") == [["run-adapter", "model", files, ["latest", "best"]]]
    assert wandb.asked("finish") == [[0, {"run/exact_match": 0.5}]]
    process = tracker._process
    assert process is not None
    tracker.let_go()
    tracker.let_go()
    assert process.poll() is not None
    assert "wandb" not in sys.modules or not hasattr(sys.modules["wandb"], "PLAN")


@pytest.mark.parametrize(
    ("more", "cfg"), [({"log_adapter": False}, {}), ({}, {"method": {"trains": "all", "rank": None}})]
)
def test_no_adapter_is_sent_when_not_asked_for_and_never_a_whole_model(
    more: dict[str, Any], cfg: dict[str, Any], wandb: Wandb, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_text("x")
    tracker = WandbTracker("p", **more)
    tracker.start(context(tmp_path, **cfg))
    tracker.finish(Ending({}, tmp_path))
    tracker.let_go()
    assert wandb.asked("artifact") == []
    assert len(wandb.asked("finish")) == 1


def test_a_server_that_refuses_makes_the_run_an_offline_one(wandb: Wandb, tmp_path: Path) -> None:
    wandb.plan(init_online="raise")
    tracker = WandbTracker("p")
    note = tracker.start(context(tmp_path))
    tracker.log(1, {"train/loss": 1.5})
    tracker.let_go()
    assert note == (
        "no connection (refused: key ***); kept in wandb/offline-run-1 of the run folder, to be sent with wandb sync."
    )
    assert len(wandb.asked("init offline")) == 1
    assert wandb.asked("log") == [[{"train/loss": 1.5}, 1]]


def test_an_error_is_told_without_the_key_and_the_process_lives_on(wandb: Wandb, tmp_path: Path) -> None:
    wandb.plan(log="raise")
    tracker = WandbTracker("p")
    tracker.start(context(tmp_path))
    with pytest.raises(ConnectionError, match=r"^refused: key \*\*\*$"):
        tracker.log(1, {})
    tracker.finish(Ending({}, failed=True))
    assert wandb.asked("finish") == [[1, {}]]
    tracker.let_go()
    with pytest.raises(ConnectionError, match="its process has ended"):
        tracker.log(2, {})


def test_a_process_that_dies_is_an_error(wandb: Wandb, tmp_path: Path) -> None:
    (wandb.folder / "wandb.py").write_text("import os; os._exit(3)")
    tracker = WandbTracker("p")
    with pytest.raises(ConnectionError, match="its process has ended"):
        tracker.start(context(tmp_path))
    tracker.let_go()


@pytest.mark.parametrize("mode", ["offline", "dryrun", "disabled"])
def test_the_environment_can_ask_for_less(
    mode: str, wandb: Wandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    tracker = WandbTracker("p")
    tracker.start(context(tmp_path))
    tracker.log(1, {})
    tracker.finish(Ending({}, tmp_path))
    tracker.let_go()
    assert wandb.asked("init online") == []
    assert len(wandb.asked("init offline")) == (mode != "disabled")
    assert all("WANDB_API_KEY" not in environment for _, environment, _ in wandb.asked("init offline"))


def test_no_secret_but_the_key_is_passed_on() -> None:
    environment = {
        "PATH": "/bin", "HF_TOKEN": "a", "MY_API_KEY": "b", "AWS_SECRET_ACCESS_KEY": "c", "WANDB_API_KEY": KEY,
        "WANDB_BASE_URL": "https://host", "WANDB_NOTES": f"{KEY}", "WANDB_RUN_ID": "x", "https_proxy": "http://p:1",
    }  # fmt: skip
    passed = process_environment(environment, Path("/run"), scratch="/s", offline=False)
    assert set(passed) == {
        "PATH", "WANDB_API_KEY", "WANDB_BASE_URL", "https_proxy", "WANDB_ERROR_REPORTING", "WANDB_DATA_DIR",
        "WANDB_CACHE_DIR",
    }  # fmt: skip
    assert passed["WANDB_DATA_DIR"] == os.path.join("/run", "wandb")
    assert "WANDB_API_KEY" not in process_environment(environment, Path("/run"), scratch="/s", offline=True)


def test_a_killed_run_leaves_its_process_the_time_to_close(wandb: Wandb, tmp_path: Path) -> None:
    code = (
        "import os, signal\nfrom pathlib import Path\n"
        "from fine_tune.tracking.context import RunContext\n"
        "from fine_tune.tracking.wandb_tracker import WandbTracker\n"
        "tracker = WandbTracker('p')\n"
        f"tracker.start(RunContext(Path({str(tmp_path)!r}), 'abc', {{}}, 0))\n"
        "print(tracker._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    repository = str(Path(__file__).resolve().parents[3])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=repository, timeout=60, check=False
    )
    assert done.returncode == -9, done.stderr
    end = time.monotonic() + 20
    while not wandb.asked("finish") and time.monotonic() < end:
        time.sleep(0.05)
    assert wandb.asked("finish") == [[1, {}]]
    pid = int(done.stdout)
    while _alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def test_only_numbers_and_text_are_safe(tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.json", "model.pt", "x.pkl", "code.py", "chat_template.jinja", "README.md"):
        (tmp_path / name).write_text("x")
    (tmp_path / "inner.json").mkdir()
    assert [file.name for file in safe_files(tmp_path)] == ["README.md", "a.json", "b.safetensors", "chat_template.jinja"]
