"""chat at a pseudo-terminal: it streams, stops, stands side by side, and what a key saves trains."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import fine_tune

from .typist import Typist, at_a_terminal, ready_to_start


@pytest.fixture(scope="module")
def taught(built_in_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the built-in base, which has learned to end an answer, under the name that the chat shows."""
    return shutil.copytree(built_in_run, tmp_path_factory.mktemp("taught") / "sft")


@pytest.fixture(scope="module")
def ready() -> Iterator[subprocess.Popen[str]]:
    with ready_to_start() as process:
        yield process


@pytest.fixture
def rambling(ready: subprocess.Popen[str]) -> Iterator[Typist]:
    """The built-in base at a terminal; it hardly ever ends an answer by itself."""
    with at_a_terminal(ready, ["chat", "ckpt=base", "accelerator=cpu", "max_new_tokens=30"], slowly=True) as typist:
        typist.wait_for("you> ")
        yield typist


def test_an_answer_streams_and_ctrl_c_stops_it_and_not_the_program(rambling: Typist) -> None:
    rambling.type("Tell me about the ferry.\n")
    rambling.wait_for("base> ")
    # Words are there while the answer goes on: it can still be stopped, before its last token.
    rambling.wait_for(" ")
    rambling.type("\x03")
    told = rambling.wait_for("you> ")
    assert "(stopped)" in told
    rambling.type("And the tanner?\n")
    rambling.wait_for("base> ")
    rambling.wait_for(" ")
    # Typed ahead: it does not stand in the answer, and is read when the answer is over.
    rambling.type("/undo\n")
    told = rambling.wait_for("(taken back: And the tanner?)")
    assert told.index("you> ") < told.index("/undo")
    rambling.wait_for("you> ")
    rambling.interrupt("(Ctrl-D or /quit leaves)")
    rambling.wait_for("you> ")
    rambling.type("\x04")
    assert rambling.end() == 0
    assert "Traceback" not in rambling.seen


@pytest.mark.parametrize("columns", [130, pytest.param(80, marks=pytest.mark.drill)])
def test_two_checkpoints_at_a_terminal_save_pairs_that_train(
    columns: int, ready: subprocess.Popen[str], taught: Path, tmp_path: Path
) -> None:
    file = tmp_path / "pairs.jsonl"
    words = ["chat", f"ckpt=[base,{taught}]", "accelerator=cpu", "max_new_tokens=24", f"save={file}"]
    questions = ["What is 3 plus 4?", "Which animal lives in the barn?", "Hello there."]
    with at_a_terminal(ready, words, columns=columns) as typist:
        for question in questions:
            typist.wait_for("you> ")
            typist.type(f"{question}\n")
            told = typist.wait_for("better: ")
            assert "1 base" in told
            assert "2 sft" in told
            assert ("\x1b[1A" in told) is (columns == 130), "columns are redrawn, lines are not"
            typist.wait_for("> ")
            typist.type("2")
        typist.wait_for("you> ")
        typist.type("/quit\n" if columns == 130 else "Bye.\n")
        if columns == 80:
            # While single keys are read: the terminal must get its lines and its echo back.
            typist.wait_for("better: ")
            typist.process.terminate()
        assert typist.end() == (0 if columns == 130 else 143)
        assert typist.line_mode()
    assert f"3 pairs added to {file}" in re.sub(r"\s*\n\s*", " ", typist.seen)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"][-1]["content"] for row in rows] == questions
    assert [len(row["prompt"]) for row in rows] == [1, 3, 5]
    for number, row in enumerate(rows):
        assert row["prompt"][1::2] == [{"role": "assistant", "content": one["chosen"]} for one in rows[:number]]
    assert {(row["chosen_from"], row["rejected_from"]) for row in rows} == {("sft", "base")}
    if columns == 80:
        return
    job = [
        "objective=dpo", "data=preferences", f"data.path={file}", "data.max_seq_len=256", "data.val_share=0.0",
        "data.num_eval_items=0", f"data.cache_dir={tmp_path}", "trainer=cpu", "trainer.max_steps=2", "callbacks.preview=null",
        "optim.global_batch_size=3",
        "optim.lr=1e-3", "optim.warmup_share=0.0", f"init_from={taught}", f"run_dir={tmp_path / 'dpo'}",
    ]  # fmt: skip
    fine_tune.train(job)
    ledger = json.loads((tmp_path / "dpo" / "data_ledger.json").read_text(encoding="utf-8"))
    assert "identical_pair" not in json.dumps(ledger)
    first, second = (json.loads(line) for line in (tmp_path / "dpo" / "metrics.jsonl").read_text().splitlines()[:2])
    assert first["train/loss"] == pytest.approx(0.693147, abs=1e-5)
    assert second["train/rewards/margins"] > 0, "the preferred answers have gained"
