"""Rows that a run is refused for are prepared all the same for whoever looks at them, and kept for nobody."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from fine_tune.data.prepare import PrepareSpec, examine, prepare
from fine_tune.errors import DataError
from fine_tune.text.template import ChatTemplate, load_template

Tokenizer = PreTrainedTokenizerFast


@pytest.fixture
def template(characters: Tokenizer) -> ChatTemplate:
    return load_template("guanaco", bos_token=characters.bos_token, eos_token=characters.eos_token)


def spec_of(tmp_path: Path, lengths: list[int], **keys: object) -> PrepareSpec:
    rows = [{"instruction": f"question {n}", "output": "y" * length} for n, length in enumerate(lengths)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"val_share": 0.0, "max_seq_len": 60, "cache_dir": str(tmp_path / "cache"), **keys}
    return PrepareSpec(format="instructions", path=str(file), **options)  # type: ignore[arg-type]


def test_sound_rows_come_without_a_refusal(tmp_path: Path, characters: Tokenizer, template: ChatTemplate) -> None:
    prepared, refusals = examine(spec_of(tmp_path, [1, 2]), characters, template)
    assert (len(prepared.train), refusals) == (2, [])
    assert prepare(spec_of(tmp_path, [1, 2]), characters, template).from_cache


def test_lost_rows_are_refused_beside_the_rows_that_are_left(
    tmp_path: Path, characters: Tokenizer, template: ChatTemplate
) -> None:
    spec = spec_of(tmp_path, [1, 90, 2])
    for _ in range(2):  # built, then found in the cache
        prepared, [refused] = examine(spec, characters, template)
        assert prepared.train.row_ids == ["rows.jsonl:1", "rows.jsonl:3"]
        assert str(refused).startswith("data.max_lost_share=0.05: 1 of 3 rows (33.3%) would be lost.")


def test_every_refusal_is_told_and_prepare_raises_the_first(
    tmp_path: Path, characters: Tokenizer, template: ChatTemplate
) -> None:
    spec = spec_of(tmp_path, [1, 90, 2], overflow="error")
    prepared, refusals = examine(spec, characters, template)
    assert [str(refused).partition(":")[0] for refused in refusals] == ["data.overflow=error", "data.max_lost_share=0.05"]
    with pytest.raises(DataError, match=r"data\.overflow=error: 1 row"):
        prepare(spec, characters, template)
    # Not even the rows that are left are kept for a run to find.
    assert not prepared.from_cache
    assert not (tmp_path / "cache").exists()
