"""The folder of an evaluation: what is finished is read, what is damaged is not, what is done stays done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fine_tune.evaluation.record import Record, Result

CHUNKS = [[0, 2], [1], [3]]
DONE = {0: [{"correct": True}, {"correct": False}], 1: [{"correct": None}], 2: [{"correct": True}]}
REPORT = {"name": "n", "checkpoint": "c", "num_items": 4, "metrics": {"accuracy": 0.5}, "seconds": 1.0}


def record(folder: Path, compares: str | None = "correct", **key: Any) -> Record:
    return Record(folder, {"seed": 0, "rate": float("nan"), **key}, compares)


def lines(folder: Path, name: str) -> list[Any]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="ascii").splitlines()]


def started(folder: Path, *indices: int) -> Record:
    found = record(folder)
    assert found.start(CHUNKS) == {}
    for index in indices:
        found.add(index, DONE[index])
    return found


def test_chunks_come_back_and_the_running_mean_goes_on(tmp_path: Path) -> None:
    started(tmp_path, 0, 1)
    again = record(tmp_path)
    assert again.finished() is None
    assert again.start(CHUNKS) == {0: DONE[0], 1: DONE[1]}
    again.add(2, DONE[2])
    assert [entry["done"] for entry in lines(tmp_path, "progress.jsonl")] == [2, 2, 3]
    assert lines(tmp_path, "progress.jsonl")[-1]["mean"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "tail",
    [
        '{"chunk": 1, "lines": [{"corr', '{"chunk": 1}\n', '{"chunk": 3, "lines": [{}]}\n', '{"chunk": -1, "lines": [{}]}\n',
        '{"chunk": 1, "lines": [{}, {}]}\n', "[]\n", '{"chunk": 0, "lines": [{}, {}]}\n', "\udcff\n",
    ],
)  # fmt: skip
def test_what_cannot_be_a_chunk_is_cut_away_for_good(tail: str, tmp_path: Path) -> None:
    started(tmp_path, 0)
    file = tmp_path / "partial.jsonl"
    clean = file.read_bytes()
    file.write_bytes(clean + tail.encode("utf-8", errors="surrogateescape"))
    (tmp_path / "progress.jsonl").write_text('{"done": 1', encoding="utf-8")
    assert record(tmp_path).start(CHUNKS) == {0: DONE[0]}
    assert file.read_bytes() == clean
    assert lines(tmp_path, "progress.jsonl") == [{"done": 2, "mean": 0.5}]


def test_a_finished_one_is_read_and_its_chunks_go(tmp_path: Path) -> None:
    open_one = started(tmp_path, 0, 1, 2)
    flat = [DONE[0][0], DONE[1][0], DONE[0][1], DONE[2][0]]
    result = open_one.finish(REPORT, flat)
    assert result == Result("c", tmp_path, flat, {"accuracy": 0.5})
    assert sorted(x.name for x in tmp_path.iterdir()) == ["items.jsonl", "key.json", "metrics.json", "progress.jsonl"]
    # Killed just before it took its chunks away.
    (tmp_path / "partial.jsonl").touch()
    (tmp_path / ".tmp-12345678-items.jsonl").touch()
    assert record(tmp_path).finished() == result
    assert sorted(x.name for x in tmp_path.iterdir()) == ["items.jsonl", "key.json", "metrics.json", "progress.jsonl"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"num_items": 3}', "\x00"])
@pytest.mark.parametrize("name", ["metrics.json", "key.json"])
def test_a_damaged_one_is_not(name: str, text: str, tmp_path: Path) -> None:
    started(tmp_path).finish(REPORT, [{"id": i} for i in range(4)])
    assert record(tmp_path).finished() is not None
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert record(tmp_path).finished() is None
    assert record(tmp_path).start(CHUNKS) == {}
    assert sorted(x.name for x in tmp_path.iterdir() if x.name != "progress.jsonl") == ["key.json"]


def test_fewer_items_than_it_says_are_not_a_result(tmp_path: Path) -> None:
    started(tmp_path).finish(REPORT, [{"id": i} for i in range(3)])
    assert record(tmp_path).finished() is None


def test_nothing_of_another_key_is_used(tmp_path: Path) -> None:
    started(tmp_path, 0).finish(REPORT, [{"id": i} for i in range(4)])
    assert record(tmp_path, seed=1).finished() is None
    started(tmp_path, 0)
    assert record(tmp_path, seed=1).start(CHUNKS) == {}
    assert [x.name for x in tmp_path.iterdir()] == ["key.json"]
    assert json.loads((tmp_path / "key.json").read_text(encoding="utf-8")) == {"seed": 1, "rate": None}
    assert record(tmp_path).start(CHUNKS) == {}, "nor that of the first one any more"


def test_without_a_field_to_compare_there_is_no_running_mean(tmp_path: Path) -> None:
    found = record(tmp_path, None)
    found.start(CHUNKS)
    found.add(0, DONE[0])
    record(tmp_path, None).start(CHUNKS)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["key.json", "partial.jsonl"]
