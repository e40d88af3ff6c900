from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from fine_tune.data.readers import RawRow
from fine_tune.errors import ConfigError, DataError
from fine_tune.evaluation import mmlu_data
from fine_tune.evaluation.mmlu_data import (
    CATEGORIES,
    CATEGORY_OF,
    Question,
    category_of,
    hub_question,
    prompt_of,
    read_csv,
    read_hub_set,
    read_json,
)

ROWS = {
    "virology": [
        ["A virus, says\nX, is", "alive", 'a "thing"', "dead", "none", "C"],
        ["Which?", "1", "2", "3", "4", "A"],
    ],
    "world_religions": [["Who?", "a", "b", "c", "d", "D"]],
}
SHOTS = {subject: [[f"{subject} {n}?", "p", "q", "r", "s", "ABCDA"[n]] for n in range(5)] for subject in ROWS}
FIVE = (
    "The following are multiple choice questions (with answers) about  world religions.\n\n"
    "world_religions 0?\nA. p\nB. q\nC. r\nD. s\nAnswer: A\n\n"
    "world_religions 1?\nA. p\nB. q\nC. r\nD. s\nAnswer: B\n\n"
    "world_religions 2?\nA. p\nB. q\nC. r\nD. s\nAnswer: C\n\n"
    "world_religions 3?\nA. p\nB. q\nC. r\nD. s\nAnswer: D\n\n"
    "world_religions 4?\nA. p\nB. q\nC. r\nD. s\nAnswer: A\n\n"
    "Who?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
)


def write(folder: Path) -> Path:
    """MMLU's folders, two subjects."""
    for split, tables in (("val", ROWS), ("dev", SHOTS)):
        (folder / split).mkdir(parents=True)
        for subject, rows in tables.items():
            with (folder / split / f"{subject}_{split}.csv").open("w", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerows(rows)
    return folder


def write_json(folder: Path, words: str, prompts: list[mmlu_data.Prompt]) -> Path:
    rows = [{"subject": p.subject, "input": p.prompt, "output": p.target} for p in prompts]
    file = folder / f"{words}_shot_mmlu_val.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_csv_prompts_letter_by_letter(tmp_path: Path) -> None:
    found = read_csv(str(write(tmp_path)), shots=5, split="val")
    assert [(p.id, p.target) for p in found] == [("virology/0", "C"), ("virology/1", "A"), ("world_religions/0", "D")]
    assert found[2].prompt == FIVE


def test_zero_shot_needs_no_examples(tmp_path: Path) -> None:
    folder = write(tmp_path)
    for file in (folder / "dev").iterdir():
        file.unlink()
    assert read_csv(str(folder), shots=0, split="val")[0].prompt == (
        "The following are multiple choice questions (with answers) about  virology.\n\n"
        'A virus, says\nX, is\nA. alive\nB. a "thing"\nC. dead\nD. none\nAnswer:'
    )


@pytest.mark.parametrize(("shots", "words"), [(5, "five"), (0, "zero")])
def test_json_and_csv_are_the_same_prompts(tmp_path: Path, shots: int, words: str) -> None:
    ours = read_csv(str(write(tmp_path)), shots=shots, split="val")
    file = write_json(tmp_path, words, ours)
    assert read_json(str(file), shots=shots, split="val") == ours
    # The folder names the file.
    assert read_json(str(tmp_path), shots=shots, split="val") == ours


def test_json_of_another_number_of_shots_is_refused(tmp_path: Path) -> None:
    file = write_json(tmp_path, "zero", read_csv(str(write(tmp_path)), shots=0, split="val"))
    with pytest.raises(ConfigError, match=r"eval.shots=5: the prompts of zero_shot_mmlu_val.json hold 0 examples"):
        read_json(str(file), shots=5, split="val")
    with pytest.raises(ConfigError, match=r"eval.shots=3: the JSON files have 0 or 5"):
        read_json(str(tmp_path), shots=3, split="val")


def test_more_shots_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"eval.shots=6: virology has 5 examples in its dev split. Pass eval.shots=5"):
        read_csv(str(write(tmp_path)), shots=6, split="val")


def test_hub_rows_are_the_same_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(hub: str, *, subset: str, revision: str | None, split: str) -> list[RawRow]:
        assert (hub, subset, revision) == ("cais/mmlu", "all", "abc")
        tables = {"dev": SHOTS, "validation": ROWS}[split]
        found = [
            {"question": r[0], "subject": s, "choices": r[1:5], "answer": "ABCD".index(r[5])}
            for s in tables
            for r in tables[s]
        ]
        return [RawRow(row, f"{split}[{i}]") for i, row in enumerate(found)]

    monkeypatch.setattr(mmlu_data, "read_hub", rows)
    ours = read_hub_set("cais/mmlu", revision="abc", shots=5, split="val")
    assert ours == read_csv(str(write(tmp_path)), shots=5, split="val")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 4}, "answer=4: must be a place from 0 to 3"),
        ({"answer": True}, "answer=True"),
        ({"choices": ["1", "2", "3"]}, "choices: must be a list of 4"),
    ],
)
def test_damaged_hub_rows(change: dict[str, object], message: str) -> None:
    row = {"question": "?", "subject": "s", "choices": list("wxyz"), "answer": 0, **change}
    with pytest.raises(ValueError, match=message):
        hub_question(row, "row 0")


def test_damaged_files_are_told_with_their_lines(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "val" / "virology_val.csv").write_text("a,b,c,d,e,A\nonly,three,cells\nq,1,2,3,4,E\n")
    with pytest.raises(DataError) as caught:
        read_csv(str(folder), shots=0, split="val")
    assert "virology_val.csv:2: 3 columns; needs question, A, B, C, D, answer" in str(caught.value)
    assert "virology_val.csv:3: answer 'E': must be one of A, B, C, D" in str(caught.value)
    with pytest.raises(DataError, match=r"no test/\*_test.csv there"):
        read_csv(str(folder), shots=0, split="test")
    file = tmp_path / "x.json"
    file.write_text('{"subject": "s", "input": "", "output": "A"}\n')
    with pytest.raises(DataError, match=r"x.json:1: input: must be a text that is not empty"):
        read_json(str(file), shots=0, split="val")
    with pytest.raises(DataError, match=r"eval.path=.*nowhere.json: no such file"):
        read_json(str(tmp_path / "nowhere.json"), shots=0, split="val")


def test_categories_divide_57_subjects() -> None:
    assert {name: len(subjects) for name, subjects in CATEGORIES.items()} == {
        "STEM": 18, "humanities": 13, "social sciences": 12, "other": 14,
    }  # fmt: skip
    assert len(CATEGORY_OF) == 57
    # Where the authors' mapping surprises, or other mappings differ from it.
    assert [CATEGORY_OF[name] for name in ("anatomy", "professional_law", "econometrics", "human_sexuality")] == [
        "other", "humanities", "social sciences", "social sciences",
    ]  # fmt: skip
    assert (category_of("virology"), category_of("x")) == ("other", "unlisted")


def test_examples_stand_in_order() -> None:
    shots = [Question("s", f"{n}?", ("a", "b", "c", "d"), "A") for n in range(2)]
    text = prompt_of(Question("s", "2?", ("a", "b", "c", "d"), "A"), shots)
    assert [text.index(f"{n}?") for n in range(3)] == sorted(text.index(f"{n}?") for n in range(3))
