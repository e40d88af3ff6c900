"""metrics.jsonl is complete whatever trackers do, and a resumed run's file is the uninterrupted one's."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fine_tune.callbacks.metrics import MetricsWriter
from fine_tune.errors import StorageError
from fine_tune.modules.step import StepResult
from fine_tune.storage import read_lines


class Tracker:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, numbers: dict[str, float], step: int) -> None:
        self.told.append((step, numbers))


def trainer_of(*loggers: Any, rank: int = 0) -> Any:
    return SimpleNamespace(loggers=list(loggers), is_global_zero=rank == 0, sanity_checking=False)


class Module:
    """Stands for a module after some step."""

    def __init__(self, *, validates: tuple[int, ...] = ()) -> None:
        self.step, self.val_metrics, self.validates = 0, dict[str, float](), validates
        self.extra_metrics: dict[str, float | None] = {"tokens_per_second": 10.0}
        self.last: Any = None

    def validates_after(self, step: int) -> bool:
        return step in self.validates

    def do(self, loss: float = 2.0, norm: float = 1.0) -> Module:
        self.step += 1
        self.last = StepResult(self.step, 0, loss, norm, 0.1, 30, 20, 4, False)
        return self


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(token: str) -> None:
        pytest.fail(f"{token} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_each_step_is_one_line_and_trackers_hear_the_same(file: Path) -> None:
    tracker, module, writer = Tracker(), Module(), MetricsWriter(file)
    for loss in (2.0, 1.5):
        writer.on_train_batch_end(trainer_of(tracker), module.do(loss))  # type: ignore[arg-type]
    writer.on_train_end(trainer_of(tracker), module)  # type: ignore[arg-type]
    first, second = lines(file)
    assert first == {
        "step": 1, "epoch": 0, "train/loss": 2.0, "learning_rate": 0.1, "grad_norm": 1.0, "samples": 4, "tokens": 30,
        "supervised_tokens": 20, "tokens_per_second": 10.0,
    }  # fmt: skip
    assert (second["step"], second["train/loss"]) == (2, 1.5)
    assert [step for step, _ in tracker.told] == [1, 2]
    assert tracker.told[0][1] == {key: value for key, value in first.items() if key != "step"}
    assert writer.train_losses == [(2.0, 20), (1.5, 20)]


def test_a_validation_joins_the_line_of_its_step(file: Path) -> None:
    module, writer, trainer = Module(validates=(2,)), MetricsWriter(file), trainer_of()
    module.val_metrics = {"loss": 4.0, "kl": 0.0}
    writer.on_validation_end(trainer, module)  # type: ignore[arg-type]
    for step in (1, 2, 3):
        writer.on_train_batch_end(trainer, module.do())  # type: ignore[arg-type]
        if step == 2:
            assert [line["step"] for line in lines(file)] == [0, 1], "held for its validation"
            module.val_metrics = {"loss": 3.0}
            writer.on_validation_end(trainer, module)  # type: ignore[arg-type]
    found = lines(file)
    assert [line["step"] for line in found] == [0, 1, 2, 3]
    assert [line.get("val/loss") for line in found] == [4.0, None, 3.0, None]
    assert found[0] == {"step": 0, "val/loss": 4.0, "val/kl": 0.0}
    assert writer.val_metrics == {0: {"val/loss": 4.0, "val/kl": 0.0}, 2: {"val/loss": 3.0}}


def test_a_finished_step_is_written_when_its_validation_fails(file: Path) -> None:
    module, writer = Module(validates=(1,)), MetricsWriter(file)
    writer.on_train_batch_end(trainer_of(), module.do())  # type: ignore[arg-type]
    assert lines(file) == []
    writer.on_exception(trainer_of(), module, RuntimeError())  # type: ignore[arg-type]
    assert [line["step"] for line in lines(file)] == [1]


def test_no_validation_rows_mean_no_line(file: Path) -> None:
    writer = MetricsWriter(file)
    writer.on_validation_end(trainer_of(), Module())  # type: ignore[arg-type]
    assert lines(file) == []


def test_numbers_that_are_not_finite_are_null(file: Path) -> None:
    tracker, module, writer = Tracker(), Module(), MetricsWriter(file)
    module.extra_metrics = {"mfu": None}
    writer.on_train_batch_end(trainer_of(tracker), module.do(norm=float("inf")))  # type: ignore[arg-type]
    (line,) = lines(file)
    assert line["grad_norm"] is None
    assert line["mfu"] is None
    assert writer.grad_norms == []
    assert "mfu" not in tracker.told[0][1]


def test_numbers_that_are_not_finite_are_told_to_nobody(file: Path) -> None:
    tracker, module, writer = Tracker(), Module(), MetricsWriter(file)
    writer.on_train_batch_end(trainer_of(tracker), module.do(loss=float("nan"), norm=float("inf")))  # type: ignore[arg-type]
    ((_, told),) = tracker.told
    assert told == {key: value for key, value in lines(file)[0].items() if key != "step" and value is not None}
    assert "train/loss" not in told


def test_other_ranks_write_nothing(file: Path) -> None:
    tracker, writer = Tracker(), MetricsWriter(file)
    writer.on_train_batch_end(trainer_of(tracker, rank=1), Module().do())  # type: ignore[arg-type]
    writer.on_train_end(trainer_of(tracker, rank=1), Module())  # type: ignore[arg-type]
    assert lines(file) == []
    assert tracker.told == []


def test_resuming_cuts_the_file_back_to_the_checkpoint(file: Path) -> None:
    module, writer = Module(), MetricsWriter(file)
    for loss in (5.0, 4.0, 3.0, 2.0):
        module.val_metrics = {"loss": loss / 2}
        writer.on_train_batch_end(trainer_of(), module.do(loss))  # type: ignore[arg-type]
        if module.step == 2:
            writer._pending = {"step": 2, "train/loss": 4.0, "supervised_tokens": 20, "grad_norm": None}
            writer.on_validation_end(trainer_of(), module)  # type: ignore[arg-type]
    with file.open("a") as stream:
        stream.write('{"step": 5, "train/lo')  # a kill in the middle of a line
    again = MetricsWriter(file, first_step=2)
    assert [line["step"] for line in lines(file)] == [1, 2, 2]
    assert [loss for loss, _ in again.train_losses] == [5.0, 4.0, 4.0]
    assert again.val_metrics == {2: {"val/loss": 2.0}}
    assert again.grad_norms == [1.0, 1.0]


def test_a_new_run_starts_with_an_empty_file(file: Path) -> None:
    file.write_text('{"step": 1, "train/loss": 1.0}\n')
    assert MetricsWriter(file).train_losses == []
    assert file.read_text() == ""


def test_lines_up_to_a_step_leave_damaged_ones_out(tmp_path: Path) -> None:
    (tmp_path / "a").write_text('{"step": 1}\n{"step": 3}\n{"step": 2}\n{"st')
    assert [line["step"] for line in read_lines(tmp_path / "a")] == [1, 3, 2]
    assert [line["step"] for line in read_lines(tmp_path / "a", up_to_step=2)] == [1, 2]
    assert read_lines(tmp_path / "nowhere") == []


def test_a_folder_that_was_taken_away_is_told_and_not_made_again(file: Path) -> None:
    writer, module = MetricsWriter(file), Module()
    file.unlink()
    with pytest.raises(StorageError, match="No such file or directory") as told:
        writer.on_train_batch_end(trainer_of(), module.do())  # type: ignore[arg-type]
    assert (told.value.exit_code, file.exists()) == (8, False)
