import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fine_tune.data import prepare as prepare_room
from fine_tune.data.prepare import EvalItem, Prepared, PrepareSpec, data_fingerprint, prepare
from fine_tune.errors import DataError
from fine_tune.text.conversation import Message
from fine_tune.text.template import ChatTemplate, load_template

Tokenizer = PreTrainedTokenizerFast


@pytest.fixture
def template(characters: Tokenizer) -> ChatTemplate:
    return load_template("guanaco", bos_token=characters.bos_token, eos_token=characters.eos_token)


def write_rows(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def instructions(count: int, length: int = 1) -> list[dict[str, Any]]:
    return [{"instruction": f"question {index}", "output": "y" * length} for index in range(count)]


@pytest.fixture
def spec(tmp_path: Path) -> PrepareSpec:
    return PrepareSpec(
        format="instructions",
        path=write_rows(tmp_path / "rows.jsonl", instructions(200)),
        cache_dir=str(tmp_path / "cache"),
        val_share=0.2,
        num_eval_items=3,
    )


def same(a: Prepared, b: Prepared) -> bool:
    tables = [(a.train, b.train), (a.val, b.val)]
    equal = all(x.ids.tolist() == y.ids.tolist() and x.row_ids == y.row_ids for x, y in tables)
    equal &= all(x.loss_mask.tolist() == y.loss_mask.tolist() for x, y in tables)
    return equal and a.ledger.as_dict() == b.ledger.as_dict() and a.eval_items == b.eval_items


def test_rows_become_tables_with_a_ledger_that_adds_up(
    spec: PrepareSpec, characters: Tokenizer, template: ChatTemplate
) -> None:
    prepared = prepare(spec, characters, template)
    prepared.ledger.check()
    total = prepared.ledger.total
    assert (total.read, total.kept) == (200, 200)
    assert len(prepared.train) + len(prepared.val) == 200
    assert total.tokens.kept == len(prepared.train.ids) + len(prepared.val.ids)
    assert total.tokens.supervised == prepared.train.supervised.sum() + prepared.val.supervised.sum() == 600
    ids, mask = prepared.train.row(0)
    assert characters.decode(ids) == "<s>### Human: question 0### Assistant: y</s>"
    assert characters.decode(ids[mask]) == " y</s>"
    assert not set(prepared.train.row_ids) & set(prepared.val.row_ids)


def test_the_second_time_comes_from_the_cache_and_is_the_same(
    spec: PrepareSpec, characters: Tokenizer, template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(spec, characters, template)
    monkeypatch.setattr(prepare_room, "collect", None)
    second = prepare(spec, characters, template)
    assert (first.from_cache, second.from_cache) == (False, True)
    assert same(first, second)


def test_a_damaged_cache_is_rebuilt(spec: PrepareSpec, characters: Tokenizer, template: ChatTemplate) -> None:
    first = prepare(spec, characters, template)
    (file,) = Path(str(spec.cache_dir)).glob("*/train.arrow")
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    again = prepare(spec, characters, template)
    assert not again.from_cache
    assert same(first, again)
    assert prepare(spec, characters, template).from_cache


def test_whatever_decides_the_tables_misses_the_cache(
    spec: PrepareSpec, characters: Tokenizer, without_bos: Tokenizer, template: ChatTemplate, tmp_path: Path
) -> None:
    prepare(spec, characters, template)
    changes: list[dict[str, Any]] = [
        {"val_share": 0.3},
        {"split_seed": 1},
        {"max_seq_len": 100},
        {"max_examples": 5},
        {"overflow": "truncate_prompt"},
        {"max_val_examples": 3},
        {"options": {"context_heading": "Context:"}},
        {"path": write_rows(tmp_path / "other.jsonl", instructions(201))},
    ]
    for change in changes:
        assert not prepare(replace(spec, **change), characters, template).from_cache, change
        assert data_fingerprint(replace(spec, **change)) != data_fingerprint(spec), change
    other = load_template("plain", bos_token="<s>", eos_token="</s>")
    assert not prepare(spec, characters, other).from_cache
    assert not prepare(spec, without_bos, template).from_cache


def test_whatever_does_not_decide_the_tables_hits_the_cache(
    spec: PrepareSpec, characters: Tokenizer, template: ChatTemplate, tmp_path: Path
) -> None:
    prepare(spec, characters, template)
    moved = write_rows(tmp_path / "sub.jsonl", instructions(200))
    (tmp_path / "elsewhere").mkdir()
    moved = str(Path(moved).rename(tmp_path / "elsewhere" / "rows.jsonl"))
    for change in ({"path": moved}, {"max_lost_share": 0.5}, {"num_eval_items": 7}):
        assert prepare(replace(spec, **change), characters, template).from_cache, change  # type: ignore[arg-type]


def test_a_cache_that_cannot_be_written_only_warns(
    spec: PrepareSpec, characters: Tokenizer, template: ChatTemplate, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    prepared = prepare(replace(spec, cache_dir=str(tmp_path / "file" / "cache")), characters, template)
    assert len(prepared.train) > 0
    assert "cannot be written" in prepared.warnings[0]


def test_rows_of_one_prompt_stay_on_one_side(
    spec: PrepareSpec, characters: Tokenizer, template: ChatTemplate, tmp_path: Path
) -> None:
    rows = [
        {"instruction": f" Question  {i % 40}".upper() if i % 2 else f"question {i % 40}", "output": "y"}
        for i in range(199)
    ]
    prepared = prepare(replace(spec, path=write_rows(tmp_path / "twice.jsonl", rows)), characters, template)

    def prompts(ids: list[str]) -> set[str]:
        numbers = [int(name.split(":")[1]) - 1 for name in ids]
        return {" ".join(str(rows[n]["instruction"]).split()).lower() for n in numbers}

    assert prompts(prepared.train.row_ids)
    assert prompts(prepared.val.row_ids)
    assert not prompts(prepared.train.row_ids) & prompts(prepared.val.row_ids)


def test_max_examples_takes_by_hash_from_the_training_rows_only(
    spec: PrepareSpec, characters: Tokenizer, template: ChatTemplate
) -> None:
    whole = prepare(spec, characters, template)
    part = prepare(replace(spec, max_examples=20), characters, template)
    assert len(part.train) == 20
    assert part.val.row_ids == whole.val.row_ids
    assert set(part.train.row_ids) < set(whole.train.row_ids)
    assert part.train.row_ids != whole.train.row_ids[:20]
    assert part.ledger.total.dropped == {"max_examples": len(whole.train) - 20}
    assert part.ledger.lost_share == 0


def test_max_val_examples_keeps_the_first_of_the_drawn_order(
    spec: PrepareSpec, characters: Tokenizer, template: ChatTemplate
) -> None:
    whole = prepare(spec, characters, template)
    part = prepare(replace(spec, max_val_examples=5), characters, template)
    assert part.val.row_ids == whole.val.row_ids[:5]
    assert part.train.row_ids == whole.train.row_ids
    assert part.ledger.of("instructions", "val").dropped == {"max_val_examples": len(whole.val) - 5}


def test_val_path_is_the_validation_set_and_training_gives_way_to_it(
    spec: PrepareSpec, characters: Tokenizer, template: ChatTemplate, tmp_path: Path
) -> None:
    val = write_rows(tmp_path / "val.jsonl", [*instructions(2), {"instruction": "only here", "output": "z"}])
    prepared = prepare(replace(spec, val_path=val, max_lost_share=0.02), characters, template)
    assert sorted(prepared.val.row_ids) == ["val.jsonl:1", "val.jsonl:2", "val.jsonl:3"]
    assert len(prepared.train) == 198
    assert prepared.ledger.of("instructions", "train").examples == {
        "in_validation": ["rows.jsonl:1", "rows.jsonl:2"]
    }


def test_eval_items_are_the_first_validation_questions_that_are_whole(
    spec: PrepareSpec, characters: Tokenizer, template: ChatTemplate
) -> None:
    prepared = prepare(spec, characters, template)
    first = prepared.val.row_ids[:3]
    assert [item.id for item in prepared.eval_items] == first
    number = int(first[0].split(":")[1]) - 1
    assert prepared.eval_items[0] == EvalItem(first[0], (Message("user", f"question {number}"),), "y")


def test_lost_rows_stop_the_run_also_from_the_cache(
    spec: PrepareSpec, characters: Tokenizer, template: ChatTemplate, tmp_path: Path
) -> None:
    rows = instructions(90) + [{"instruction": "long", "output": "y" * 100}] * 10
    lossy = replace(spec, path=write_rows(tmp_path / "long.jsonl", rows), max_seq_len=60, max_lost_share=0.05)
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"data.max_lost_share=0.05: 10 of 100 rows \(10.0%\) would be lost"
        ):
            prepare(lossy, characters, template)
    prepared = prepare(replace(lossy, max_lost_share=0.1), characters, template)
    assert prepared.from_cache
    assert prepared.ledger.total.dropped == {"too_long": 10}
    assert prepared.ledger.total.tokens.dropped == 10 * len(
        "S### Human: long### Assistant: " + "y" * 100 + "E"
    )


def test_overflow_policies_account_for_every_token(
    spec: PrepareSpec, characters: Tokenizer, template: ChatTemplate, tmp_path: Path
) -> None:
    talk = [{"from": "human", "value": "q" * 9}, {"from": "gpt", "value": "a" * 9}]
    rows = [{"conversations": talk * n} for n in range(1, 7)] * 4
    chat = replace(
        spec, format="chat", path=write_rows(tmp_path / "chat.jsonl", rows), max_seq_len=120, val_share=0.0
    )
    counts = {}
    for policy in ("drop", "truncate_prompt", "truncate_completion", "keep_last_turns"):
        prepared = prepare(replace(chat, overflow=policy, max_lost_share=0.9), characters, template)  # type: ignore[arg-type]
        prepared.ledger.check()
        tokens = prepared.ledger.total.tokens
        assert tokens.read == 4 * sum(1 + 45 * n for n in range(1, 7))
        repeats = [line for line in prepared.warnings if "training rows repeat another token by token" in line]
        assert len(repeats) == 1, "every talk is there four times"
        assert (tokens.cut == 0) == (policy == "drop") == (prepared.warnings == repeats)
        counts[policy] = (len(prepared.train), tokens.kept)
        assert prepared.train.lengths.max() <= 120
    exchange = len("### Human: qqqqqqqqq### Assistant: aaaaaaaaaE")
    assert exchange == 45
    assert counts == {
        "drop": (8, 4 * (46 + 91)),
        "truncate_prompt": (24, 4 * (46 + 91 + 4 * 120)),
        # The prompt of the third exchange would stand without its answer: it goes too.
        "truncate_completion": (24, 4 * (46 + 91 + 4 * 91)),
        "keep_last_turns": (24, 4 * (46 + 91 + 4 * 91)),
    }


def test_overflow_error_names_the_rows(
    spec: PrepareSpec, characters: Tokenizer, template: ChatTemplate, tmp_path: Path
) -> None:
    rows = [*instructions(20), {"instruction": "long", "output": "y" * 99}]
    strict = replace(
        spec,
        path=write_rows(tmp_path / "r.jsonl", rows),
        max_seq_len=60,
        overflow="error",
        max_lost_share=1.0,
    )
    with pytest.raises(
        DataError, match=r"data.overflow=error: 1 row\(s\).*r.jsonl:21 \(131\).*data.max_seq_len=131"
    ):
        prepare(strict, characters, template)


def test_an_answer_that_does_not_end_in_a_learned_stop_is_refused(
    spec: PrepareSpec, characters: Tokenizer, template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fine_tune.text.encode import Encoder

    whole = Encoder._assemble

    def without_stop(self: Encoder, parts: Any, *, is_document: bool) -> Any:
        encoded = whole(self, parts, is_document=is_document)
        encoded.num_stops = 0
        return encoded

    monkeypatch.setattr(Encoder, "_assemble", without_stop)
    with pytest.raises(
        DataError, match=r"200 row\(s\) have an answer that does not end in the learned token '</s>'"
    ):
        prepare(spec, characters, template)


def test_progress_counts_up_to_all_rows(
    spec: PrepareSpec, characters: Tokenizer, template: ChatTemplate
) -> None:
    seen: list[tuple[str, int, int | None]] = []
    prepare(spec, characters, template, progress=lambda *step: seen.append(step))
    assert seen[0] == ("read", 0, None)
    assert seen[-1] == ("tokenize", 200, 200)
