"""Previews: fixed prompts, the base's answers beside, and nothing a terminal would obey."""

from __future__ import annotations

import io
import json
import random
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from fine_tune.callbacks import preview
from fine_tune.callbacks.preview import GenerationPreview, _brief
from fine_tune.errors import StorageError
from fine_tune.evaluation.answers import Completion


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain [bold] text\nsecond line", "plain [bold] text\nsecond line"),
        ("\x1b[31mred\x1b[0m", " [31mred [0m"),
        ("\x1b]0;title\x07bell\x08\x7f", " ]0;title bell  "),
        ("tab\tcarriage\rreturn", "tab carriage return"),
        ("right\u202eleft\u200b", "right left "),
        ("\u00e9\u4e16", "\u00e9\u4e16"),
    ],
)
def test_control_characters_are_blanks(text: str, shown: str) -> None:
    assert _brief(text) == shown


def test_long_answers_are_cut_and_say_so() -> None:
    assert _brief("a" * 240) == "a" * 240
    assert _brief("a" * 241) == "a" * 237 + "..."
    assert _brief("abcdef", limit=5) == "ab..."


class Asked:
    """Answers with the step it was asked at, and draws a random number to do so."""

    def __init__(self, module: Any) -> None:
        self.module, self.calls = module, []

    def has_adapter(self) -> bool:
        return True

    def answer(self, conversations: Any, *, max_new_tokens: int, base: bool) -> list[Completion]:
        random.random()
        self.calls.append((self.module.step, base))
        said = "base" if base else f"at {self.module.step} \x1b[31m[x]"
        return [Completion(said, 1) for _ in conversations]


def job(folder: Path, *, step: int = 0, rank: int = 0) -> tuple[Any, Any]:
    module = SimpleNamespace(step=step, clock=SimpleNamespace(paused=nullcontext))
    module.answerer = Asked(module)
    items = [SimpleNamespace(messages=(SimpleNamespace(role="user", content=f"item {i}"),)) for i in range(5)]
    data = SimpleNamespace(prepared=SimpleNamespace(eval_items=items))
    trainer = SimpleNamespace(default_root_dir=str(folder), is_global_zero=rank == 0, loggers=[], datamodule=data)
    return trainer, module


@pytest.fixture(autouse=True)
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr(preview, "get_console", lambda: Console(file=stream, width=80))
    return stream


def run(callback: GenerationPreview, trainer: Any, module: Any, last: int) -> None:
    callback.on_train_start(trainer, module)
    while module.step < last:
        module.step += 1
        callback.on_train_batch_end(trainer, module)
    callback.on_train_end(trainer, module)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "previews.jsonl").read_text().splitlines()]


def test_previews_come_at_the_start_every_n_steps_and_at_the_end(tmp_path: Path, screen: io.StringIO) -> None:
    trainer, module = job(tmp_path)
    run(GenerationPreview(every_n_steps=2, num_prompts=1), trainer, module, 5)
    assert [row["step"] for row in rows(tmp_path)] == [0, 2, 4, 5]
    assert module.answerer.calls == [(0, True), (0, False), (2, False), (4, False), (5, False)]
    assert rows(tmp_path)[1] == {
        "step": 2, "prompt": "item 0", "completion": "at 2 \x1b[31m[x]", "base_completion": "base",
    }  # fmt: skip
    assert "\x1b" not in screen.getvalue()
    assert "at 2  [31m[x]" in screen.getvalue()


def test_a_last_step_that_was_due_is_previewed_once(tmp_path: Path) -> None:
    trainer, module = job(tmp_path)
    run(GenerationPreview(every_n_steps=2, num_prompts=2), trainer, module, 4)
    assert [row["step"] for row in rows(tmp_path)] == [0, 0, 2, 2, 4, 4]
    assert {row["prompt"] for row in rows(tmp_path)} == {"item 0", "item 1"}


def test_the_users_prompts_take_the_place_of_items(tmp_path: Path) -> None:
    trainer, module = job(tmp_path)
    run(GenerationPreview(every_n_steps=9, prompts=["mine", "too"]), trainer, module, 0)
    assert [row["prompt"] for row in rows(tmp_path)] == ["mine", "too"]


def test_no_prompts_mean_no_questions(tmp_path: Path) -> None:
    trainer, module = job(tmp_path)
    run(GenerationPreview(every_n_steps=1, prompts=[]), trainer, module, 3)
    assert module.answerer.calls == []


def test_resuming_keeps_the_bases_answers_and_drops_later_rows(tmp_path: Path) -> None:
    trainer, module = job(tmp_path)
    run(GenerationPreview(every_n_steps=2, num_prompts=2), trainer, module, 5)
    trainer, module = job(tmp_path, step=2)
    run(GenerationPreview(every_n_steps=2, num_prompts=2), trainer, module, 6)
    assert [row["step"] for row in rows(tmp_path)] == [0, 0, 2, 2, 4, 4, 6, 6]
    assert not any(base for _, base in module.answerer.calls)
    assert {row["base_completion"] for row in rows(tmp_path)} == {"base"}


def test_previews_draw_nothing_from_training(tmp_path: Path) -> None:
    trainer, module = job(tmp_path)
    random.seed(1)
    expected = random.random()
    random.seed(1)
    run(GenerationPreview(every_n_steps=1), trainer, module, 3)
    assert random.random() == expected


def test_other_ranks_answer_along_and_write_nothing(tmp_path: Path, screen: io.StringIO) -> None:
    trainer, module = job(tmp_path, rank=1)
    run(GenerationPreview(every_n_steps=2, num_prompts=1), trainer, module, 2)
    assert not (tmp_path / "previews.jsonl").exists()
    assert module.answerer.calls == [(0, True), (0, False), (2, False)]
    assert screen.getvalue() == ""


def test_a_run_whose_folder_is_gone_is_told_so_in_one_line(tmp_path: Path) -> None:
    trainer, module = job(tmp_path)
    callback = GenerationPreview(every_n_steps=2, prompts=["a", "b"])
    callback.on_train_start(trainer, module)
    (tmp_path / "previews.jsonl").unlink()
    module.step = 2
    with pytest.raises(StorageError, match=r"cannot write .*previews\.jsonl: No such file"):
        callback.on_train_batch_end(trainer, module)
