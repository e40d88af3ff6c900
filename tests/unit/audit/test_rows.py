from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders
from transformers import PreTrainedTokenizerFast

from fine_tune.audit import spelling
from fine_tune.audit.choosing import cut_rows, dropped_rows, kept_kinds, sample
from fine_tune.audit.placing import encode_whole, is_as_encoded
from fine_tune.audit.rows import lay_out
from fine_tune.audit.spelling import spell
from fine_tune.text.template import ChatTemplate

from .small_data import Data, pair, talk

Tokenizer = PreTrainedTokenizerFast


def marks(laid: Any) -> str:
    return "".join({"learned": "x", "masked": ".", "cut": "-"}[state] for _, state in laid)


@pytest.mark.parametrize(
    ("kept", "mask", "expected"),
    [
        ([1, 5, 6, 7, 8, 2], "..xxxx", "..xxxx"),
        ([1, 7, 8, 2], "..xx", ".--.xx"),  # from the left of the prompt, the first token excepted
        ([1, 5, 6], "..x", "..x---"),  # from the end
        ([7, 8, 2], ".xx", "---.xx"),
        ([1, 5, 9, 8, 2], "...xx", "..--.xx"),  # written anew behind the cut
        ([], "", "------"),
    ],
)
def test_what_was_cut_is_put_back_where_it_stood(kept: list[int], mask: str, expected: str) -> None:
    laid = lay_out([1, 5, 6, 7, 8, 2], kept, [mark == "x" for mark in mask])
    assert marks(laid) == expected
    assert [token for token, state in laid if state != "cut"] == kept


def test_the_repeated_end_of_a_cut_row_does_not_hide_the_cut() -> None:
    assert marks(lay_out([1, 5, 2, 6, 2], [1, 5, 2], [False, True, True])) == ".xx--"


def test_tokens_write_what_the_text_says(byte_level: Tokenizer) -> None:
    text = "<s><|user|>\nCaf\u00e9 \U0001f600, twice  spaced</s>"
    ids = byte_level(text, add_special_tokens=False)["input_ids"]
    spelled = spell(byte_level, ids)
    assert len(spelled) == len(ids)
    assert "".join(spelled) == text
    # A character of several tokens is written by its last one.
    assert spelled[spelled.index("\U0001f600") - 1] == ""


def test_half_a_character_shows_as_such(byte_level: Tokenizer) -> None:
    ids = byte_level("a\U0001f600", add_special_tokens=False)["input_ids"]
    assert spell(byte_level, ids[:-1]) == ["a", *[""] * (len(ids) - 3), "\ufffd"]


@pytest.mark.parametrize("error", [TypeError("no such id"), MemoryError(), RuntimeError("poisoned")])
def test_only_broken_bytes_are_broken_bytes(
    byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    class Stream:
        def __init__(self, **options: Any) -> None:
            pass

        def step(self, tokenizer: Any, token: int) -> str:
            raise error

    monkeypatch.setattr(spelling, "DecodeStream", Stream)
    with pytest.raises(type(error)):
        spell(byte_level, [1])


def test_bytes_that_no_text_has_do_not_hide_what_follows(byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    class Stream:
        def __init__(self, **options: Any) -> None:
            begun.append(1)

        def step(self, tokenizer: Any, token: int) -> str:
            if token == 7:
                raise Exception("Invalid prefix encountered")
            return f"<{token}>"

    monkeypatch.setattr(spelling, "DecodeStream", Stream)
    assert spell(byte_level, [1, 7, 2]) == ["<1>", "\ufffd", "<2>"]
    assert len(begun) == 2


def test_a_tokenizer_without_a_backend_names_its_tokens() -> None:
    class Slow:
        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [f"t{i}" for i in ids]

    assert spell(Slow(), [4, 2]) == ["t4", "t2"]


def test_a_kept_row_shows_its_mask(tmp_path: Path, characters: Tokenizer, template: ChatTemplate) -> None:
    data = Data(tmp_path, characters, template, [talk("q", "an", "r", "b")])
    shown = data.shown(data.rows[0])
    [part] = shown.parts
    assert (
        "".join(token.text for token in part.tokens)
        == "<s>### Human: q### Assistant: an</s>### Human: r### Assistant: b</s>"
    )
    assert "".join(token.text for token in part.tokens if token.state == "learned") == " an</s> b</s>"
    assert [token.text for token in part.tokens if token.special] == ["<s>", "</s>", "</s>"]
    assert (shown.num_tokens, shown.num_learned, shown.num_cut) == (len(part.tokens), 7, 0)


def test_a_cut_row_shows_what_was_cut(tmp_path: Path, characters: Tokenizer, template: ChatTemplate) -> None:
    data = Data(tmp_path, characters, template, [talk("q", "an", "r", "b")], max_seq_len=40, overflow="keep_last_turns")
    shown = data.shown(data.rows[0])
    cut = "".join(token.text for token in shown.parts[0].tokens if token.state == "cut")
    assert cut == "### Human: q### Assistant: an</s>"
    assert "".join(t.text for t in shown.parts[0].tokens if t.state == "learned") == " b</s>"
    assert shown.num_cut == 30


def test_a_dropped_row_is_all_cut(tmp_path: Path, characters: Tokenizer, template: ChatTemplate) -> None:
    rows = [talk("q", "a"), talk("q" * 50, "a"), talk("r", "a")]
    data = Data(tmp_path, characters, template, rows, max_seq_len=40)
    assert [row.index for row in data.rows] == [0, None, 1]
    shown = data.shown(data.rows[1])
    assert {token.state for token in shown.parts[0].tokens} == {"cut"}
    [(reason, name, found)] = dropped_rows(data.rows, data.prepared.ledger, number=2)
    assert (reason, name, found) == ("too_long", "rows.jsonl:2", data.rows[1])
    # What the config asks to leave out is no loss to look into.
    fewer = Data(tmp_path, characters, template, rows, max_examples=1)
    assert fewer.prepared.ledger.total.dropped["max_examples"] == 2
    assert list(dropped_rows(fewer.rows, fewer.prepared.ledger, number=2)) == []


def test_both_sides_of_a_pair_are_spelled_behind_its_prompt(
    tmp_path: Path, characters: Tokenizer, template: ChatTemplate
) -> None:
    data = Data(
        tmp_path,
        characters,
        template,
        [pair("good", "very bad")],
        format="preferences",
        max_seq_len=38,
        overflow="truncate_completion",
    )
    shown = data.shown(data.rows[0])
    said = {part.title: "".join(token.text for token in part.tokens) for part in shown.parts}
    assert said == {"prompt": "<s>### Human: ask### Assistant:", "chosen": " good</s>", "rejected": " very bad</s>"}
    states = {part.title: {token.state for token in part.tokens} for part in shown.parts}
    assert states == {"prompt": {"masked"}, "chosen": {"learned"}, "rejected": {"learned", "cut"}}
    assert "".join(token.text for token in shown.parts[2].tokens if token.state == "cut") == "</s>"


def test_a_side_keeps_its_first_space_where_texts_lose_theirs(
    tmp_path: Path, characters: Tokenizer, template: ChatTemplate
) -> None:
    backend = RawTokenizer.from_str(characters.backend_tokenizer.to_str())
    # As the decoders of LLaMA and Mistral do.
    backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)])
    stripping = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    data = Data(tmp_path, stripping, template, [pair("good", "bad")], format="preferences")
    _, chosen, rejected = ["".join(token.text for token in part.tokens) for part in data.shown(data.rows[0]).parts]
    assert (chosen, rejected) == (" good</s>", " bad</s>")


def test_a_row_that_is_not_what_the_encoder_makes_is_told(
    tmp_path: Path, characters: Tokenizer, template: ChatTemplate
) -> None:
    data = Data(tmp_path, characters, template, [talk("q", "a")])
    [(placed, whole)] = encode_whole(data.rows, data.encoder)
    assert is_as_encoded(placed, whole)
    data.prepared.train.loss_mask = data.prepared.train.loss_mask.copy()
    data.prepared.train.loss_mask[5] = True
    assert not is_as_encoded(placed, whole)


def test_no_row_is_chosen_twice_and_a_seed_chooses_the_same(
    tmp_path: Path, characters: Tokenizer, template: ChatTemplate
) -> None:
    data = Data(tmp_path, characters, template, [talk(f"{n:02} {'q' * n}", "a") for n in range(30)])
    chosen = [(kind, row.row.id) for kind, row in kept_kinds(data.rows, number=3, seed=5)]
    assert chosen[:3] == [("longest", f"rows.jsonl:{n}") for n in (30, 29, 28)]
    assert chosen[3:6] == [("shortest", f"rows.jsonl:{n}") for n in (1, 2, 3)]
    assert [kind for kind, _ in chosen[6:]] == ["random"] * 3
    assert len({name for _, name in chosen}) == 9
    assert chosen == [(kind, row.row.id) for kind, row in kept_kinds(data.rows, number=3, seed=5)]
    assert [row.row.id for row in sample(data.rows, seed=1)] != [row.row.id for row in sample(data.rows, seed=2)]
    few = list(kept_kinds(data.rows[:2], number=3, seed=5))
    assert sorted(row.row.id for _, row in few) == ["rows.jsonl:1", "rows.jsonl:2"]


def test_of_the_rows_that_were_cut_the_shortest_are_shown(
    tmp_path: Path, characters: Tokenizer, template: ChatTemplate
) -> None:
    rows = [talk("q", "a" * n) for n in (40, 3, 60, 50)]
    data = Data(tmp_path, characters, template, rows, max_seq_len=50, overflow="truncate_completion")
    found = cut_rows(data.rows, data.encoder, number=2, max_seq_len=50)
    assert [placed.row.id for placed, _ in found] == ["rows.jsonl:1", "rows.jsonl:4"]
