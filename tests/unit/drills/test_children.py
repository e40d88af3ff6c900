"""Runs in processes of their own end as a whole, and say how."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fine_tune.drills import children
from fine_tune.drills.children import ChildFailed, descendants, failed, kill, run_to_end, run_until

# A process that starts one of its own, in a session of its own, as a launcher does.
PARENT = (
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
    "print(child.pid, flush=True)\ntime.sleep(60)\n"
)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_kill_reaches_processes_in_sessions_of_their_own() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        grandchild = int(parent.stdout.readline())
        assert list(descendants(parent.pid)) == [grandchild]
        assert kill(parent.pid)
        assert parent.wait() == -9
    deadline = time.monotonic() + 10
    while alive(grandchild) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(grandchild)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a line of Python where a run would be started."""
    monkeypatch.setattr(children, "command", lambda words, num_ranks: [sys.executable, "-c", *words])


def test_a_run_that_fails_ends_with_its_own_code_and_last_words(script: None, tmp_path: Path) -> None:
    lines = "; ".join(f"print('line {n}')" for n in range(20))
    with pytest.raises(ChildFailed, match="exit code 7") as error:
        run_to_end([f"{lines}; raise SystemExit(7)"], tmp_path / "log")
    assert error.value.exit_code == 7
    assert "line 19" in str(error.value)
    assert "line 7" not in str(error.value)
    assert run_to_end(["print(1)"], tmp_path / "log") > 0


def test_a_run_is_killed_when_something_is_due_and_not_where_it_was_over(script: None, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    waiting = f"import time, pathlib; pathlib.Path({str(mark)!r}).touch(); time.sleep(60)"
    started = time.monotonic()
    assert run_until([waiting], tmp_path / "log", mark.exists)
    assert time.monotonic() - started < 30
    assert not run_until(["pass"], tmp_path / "log", lambda: False)
    with pytest.raises(ChildFailed):
        run_until(["raise SystemExit(3)"], tmp_path / "log", lambda: False)


def test_a_signal_is_no_exit_code(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("", encoding="utf-8")
    assert failed(tmp_path / "log", -9).exit_code == 1


def test_several_ranks_are_launched_by_torchrun() -> None:
    assert children.command(["a=1"], num_ranks=1)[1:] == ["-m", "fine_tune", "train", "a=1"]
    launched = children.command(["a=1"], num_ranks=2)
    assert launched[1:3] == ["-m", "torch.distributed.run"]
    assert launched[launched.index("--nproc-per-node") + 1] == "2"
    assert launched[-4:] == ["-m", "fine_tune", "train", "a=1"]
    assert os.path.isabs(launched[0])
