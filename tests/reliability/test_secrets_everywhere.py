"""Secrets in the environment, in words, in addresses and in the words of errors: none is written or printed anywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Made up, in the form of the real ones.
WANDB = "fedcba9876543210" * 2 + "fedcba98"
ENVIRONMENT = {
    "HF_TOKEN": "hf_" + "Zq7" * 11,
    "WANDB_API_KEY": WANDB,
    "MY_SERVICE_API_KEY": "correct-horse-battery-staple",
    "HTTPS_PROXY": "http://someone:hunter2secret@127.0.0.1:9",
}
TYPED = {"override": "hf_" + "Kk3" * 11, "address": "swordfish9", "path": "sk-" + "proj-" + "x1Y" * 10}
WORDS = {
    "override": f"+callbacks.x.token={TYPED['override']}",
    "address": f"data.path=https://me:{TYPED['address']}@host/rows.jsonl",
    "path": f"data.path=/data/{TYPED['path']}/rows.jsonl",
}
IN_ERRORS = {"token": "ghp_" + "b2" * 18, "password": "tr0ub4dor"}
NEEDLES = [*ENVIRONMENT.values(), "hunter2secret", *TYPED.values(), *IN_ERRORS.values()]
JOB = [
    "trainer=cpu", "trainer.max_steps=2", "data.num_eval_items=0", "data.max_examples=64", "data.max_val_examples=8",
    "optim.global_batch_size=4", "callbacks.preview=null", "callbacks.checkpoint.every_n_steps=1", "logger=csv",
]  # fmt: skip
CRASH = f"""
from fine_tune.modules.step import StepModule
def failing(self, batch, batch_idx):
    token = __import__("os").environ["HF_TOKEN"]
    raise RuntimeError("GET https://me:{IN_ERRORS["password"]}@host/x?token={IN_ERRORS["token"]} " + token)
StepModule.training_step = failing
"""
MAIN = "import sys; from fine_tune.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a verb in a process that has nothing but one tree to write to, and secrets in its environment."""
    tree = tmp_path_factory.mktemp("tree")

    def run(*words: str, before: str = "") -> subprocess.CompletedProcess[str]:
        for name in ("home", "tmp", "work"):
            (tree / name).mkdir(exist_ok=True)
        places = {"HOME": str(tree / "home"), "TMPDIR": str(tree / "tmp"), "FINE_TUNE_CACHE": str(tree / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", before + MAIN, *words], cwd=tree / "work", env={**os.environ, **ENVIRONMENT, **places},
            capture_output=True, text=True, timeout=250, check=False,
        )  # fmt: skip
        log = tree / "printed" / f"{len(list(tree.glob('printed/*')))}.txt"
        log.parent.mkdir(exist_ok=True)
        log.write_text(done.stdout + done.stderr)
        return done

    run.tree = tree  # type: ignore[attr-defined]
    return run


def holding(tree: Path, needle: str) -> list[str]:
    """Files whose bytes or path hold a text."""
    files = [file for file in tree.rglob("*") if file.is_file()]
    return [file.name for file in files if needle.encode() in file.read_bytes() or needle in str(file.relative_to(tree))]


@pytest.mark.drill
@pytest.mark.timeout(900)
def test_train_evaluate_and_a_crash_leave_none(start: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    tree: Path = start.tree  # type: ignore[attr-defined]
    trained = start("train", *JOB, "run_dir=runs/sound")
    assert trained.returncode == 0, trained.stderr
    evaluated = start("evaluate", "ckpt=[base,runs/sound]", "eval=perplexity", "eval.num_items=4", "accelerator=cpu")
    assert evaluated.returncode == 0, evaluated.stderr
    reported = start("report", "runs/sound")
    assert reported.returncode == 0, reported.stderr

    crashed = start("train", *JOB, "run_dir=runs/crash", before=CRASH)
    assert crashed.returncode == 1
    assert "RuntimeError: GET ***host/x?token=*** ***" in crashed.stderr
    assert len(crashed.stderr.splitlines()) <= 15 + len(trained.stderr.splitlines())
    told = json.loads((tree / "work" / "runs" / "crash" / "failure.json").read_text())
    assert told == {"exit_code": 1, "error": "RuntimeError", "reason": "GET ***host/x?token=*** ***"}
    assert "in failing" in (tree / "work" / "runs" / "crash" / "error.log").read_text()

    for name, word in WORDS.items():
        refused = start("train", *JOB, f"run_dir=runs/{name}", word)
        assert refused.returncode == 2, name
        assert "looks like a secret (not shown)" in refused.stderr
        assert start("evaluate", "ckpt=base", word).returncode == 2
        assert not (tree / "work" / "runs" / name).exists()

    assert {needle: found for needle in NEEDLES if (found := holding(tree, needle))} == {}
    # The control: what is there is found, in files of every kind and in names.
    assert {"config.yaml", "report.html"} <= set(holding(tree, "builtin:tiny"))
    assert "error.log" in holding(tree, "in failing")
    (tree / "work" / WANDB).mkdir()
    (tree / "work" / WANDB / "x").write_bytes(b"\xff" + IN_ERRORS["password"].encode())
    assert [holding(tree, needle) for needle in (WANDB, IN_ERRORS["password"])] == [["x"], ["x"]]
