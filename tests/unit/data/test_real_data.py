"""Real data sets through real tokenizers: masks, BOS and ledgers are those of the texts."""

import itertools
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fine_tune.data.prepare import PrepareSpec, prepare
from fine_tune.data.readers import read_local
from fine_tune.data.sources.registry import find_format, parse_options
from fine_tune.text.conversation import Conversation, Message
from fine_tune.text.encode import Encoded, Encoder
from fine_tune.text.template import ChatTemplate, load_template

pytestmark = pytest.mark.real

TOKENIZERS = ["llama", "mistral", "phi", "pythia"]
TEMPLATES = ["guanaco", "llama2", "mistral_instruct", "instruct", "plain", "phi2"]
BOS_IN_TEMPLATE = {"phi2": 0}
# A row in eight by default; every row in the drill.
every = pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.drill)])


@cache
def load(folder: Path, name: str) -> PreTrainedTokenizerBase:
    place = str(folder / "tokenizers" / name)
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        place, trust_remote_code=False, local_files_only=True
    )
    return found


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest, real_data: Path) -> PreTrainedTokenizerBase:
    return load(real_data, request.param)


def rows(real_data: Path, name: str, tmp_path: Path) -> list[Conversation]:
    """Conversations of one data set; the guanaco forms are made from OASST1."""
    files = {
        "alpaca": "instruct/alpaca_en_demo.json",
        "sharegpt": "instruct/sharegpt_500.json",
        "oasst1": "oasst1",
    }
    formats = {"alpaca": "instructions", "sharegpt": "chat"}
    options = {"threads": "all"} if name == "oasst1" else {}
    path = str(real_data / files[name]) if name in files else guanaco_file(real_data, tmp_path, name)
    return read(formats.get(name, name), path, **options)


@cache
def read(format_name: str, path: str, **options: Any) -> list[Conversation]:
    reader = find_format(format_name).read
    found = reader(read_local(path), parse_options(format_name, options), lambda reason, row: None)
    return [row for row in found if isinstance(row, Conversation)]


def guanaco_file(real_data: Path, tmp_path: Path, form: str) -> str:
    best = read("oasst1", str(real_data / "oasst1"))
    template = load_template("guanaco" if form == "guanaco" else "llama2", bos_token="<s>", eos_token="</s>")
    file = tmp_path / "guanaco.jsonl"
    with file.open("w", encoding="utf-8") as stream:
        for row in best:
            text = template.render(row.messages)
            if form == "guanaco":
                text = text.removeprefix("<s>").replace("</s>", "")
            stream.write(json.dumps({"text": text}) + "\n")
    return str(file)


def normal(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str]:
    """What a tokenizer keeps of a text: Pythia's composes characters (NFC)."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is None or "NFC" not in repr(normalizer):
        return lambda text: text
    return lambda text: str(normalizer.normalize_str(text))


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of ids in the middle of a text: SentencePiece drops the first space, so a line goes before."""
    line = tokenizer("\n", add_special_tokens=False)["input_ids"]
    text: str = tokenizer.decode([*line, *ids], clean_up_tokenization_spaces=False)
    return text.partition("\n")[2]


def check_row(
    row: Conversation, encoded: Encoded, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> None:
    keep = normal(tokenizer)
    spans = list(zip(encoded.turn_starts, encoded.turn_ends, strict=True))
    learned = [decode(tokenizer, encoded.input_ids[a:b]) for a, b in spans]
    answers = [keep(m.content.strip()) + template.end_of_turn for m in row.messages if m.role == "assistant"]
    # The space that a format puts around an answer belongs to the completion.
    tidy = [
        text.strip().removesuffix(template.end_of_turn).rstrip() + template.end_of_turn for text in learned
    ]
    assert tidy == answers
    assert all(encoded.input_ids[b - 1] == tokenizer.eos_token_id for _, b in spans)
    covered = {i for a, b in spans for i in range(a, b)}
    assert {i for i, on in enumerate(encoded.loss_mask) if on} == covered
    assert encoded.num_stops == len(spans)


def expected_bos(template: ChatTemplate, spans: int, same_as_eos: bool) -> int:
    count = spans if template.name == "llama2" else BOS_IN_TEMPLATE.get(template.name, 1)
    return count + spans * same_as_eos


@every
@pytest.mark.parametrize(
    ("name", "template_name"),
    [
        ("oasst1", "guanaco"),
        ("oasst1", "llama2"),
        ("alpaca", "instruct"),
        ("alpaca", "llama2"),
        ("sharegpt", "guanaco"),
        ("sharegpt", "mistral_instruct"),
        ("guanaco", "guanaco"),
        ("guanaco_llama2", "llama2"),
    ],
)
def test_learned_spans_are_the_answers_and_their_ends(
    real_data: Path, tokenizer: PreTrainedTokenizerBase, name: str, template_name: str, every: int, tmp_path: Path
) -> None:
    template = load_template(template_name, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
    found = rows(real_data, name, tmp_path)
    assert (
        len(found)
        == {"oasst1": 928, "alpaca": 999, "sharegpt": 500, "guanaco": 188, "guanaco_llama2": 188}[name]
    )
    found = found[::every]
    encoder = Encoder(tokenizer, template)
    same = tokenizer.bos_token_id == tokenizer.eos_token_id
    for row, encoded in zip(found, encoder.encode_many(found), strict=True):
        assert isinstance(encoded, Encoded)
        check_row(row, encoded, tokenizer, template)
        assert encoded.has_bos
        count = encoded.input_ids.count(tokenizer.bos_token_id)
        assert count == expected_bos(template, len(encoded.turn_starts), same)


@pytest.mark.parametrize("template_name", TEMPLATES)
def test_ids_of_the_pieces_are_those_of_the_whole_text(
    real_data: Path, tokenizer: PreTrainedTokenizerBase, template_name: str, tmp_path: Path
) -> None:
    template = load_template(template_name, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
    encoder = Encoder(tokenizer, template)
    same = tokenizer.bos_token_id == tokenizer.eos_token_id
    found = rows(real_data, "oasst1", tmp_path)[::20] + rows(real_data, "alpaca", tmp_path)[::40]
    for row, encoded in zip(found, encoder.encode_many(found), strict=True):
        assert isinstance(encoded, Encoded)
        whole = tokenizer(template.render(row.messages), add_special_tokens=False)["input_ids"]
        assert encoded.input_ids == whole[: len(encoded.input_ids)]
        count = encoded.input_ids.count(tokenizer.bos_token_id)
        assert count == expected_bos(template, len(encoded.turn_starts), same)
        last = max(i for i, m in enumerate(row.messages) if m.role == "assistant")
        assert encoder.encode_prompt(row.messages[:last]) == encoded.input_ids[: encoded.turn_starts[-1]]


def test_without_the_anchor_llama_would_get_spurious_tokens(real_data: Path) -> None:
    tokenizer = load(real_data, "llama")
    template = load_template("instruct", bos_token="<s>", eos_token="</s>")
    encoder = Encoder(tokenizer, template)
    row = Conversation((Message("user", "Say hi."), Message("assistant", "Hi.")), "id", "group")
    whole = tokenizer(template.render(row.messages), add_special_tokens=False)["input_ids"]
    assert encoder.encode(row).input_ids == whole
    encoder._spans.in_text = ""
    assert encoder.encode(row).input_ids != whole


@pytest.mark.parametrize("string", ["</s>", "<s>", "<|endoftext|>", "<unk>", "[PAD]"])
def test_special_strings_in_user_text_stay_text(tokenizer: PreTrainedTokenizerBase, string: str) -> None:
    template = load_template("guanaco", bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
    row = Conversation((Message("user", f"a {string} b"), Message("assistant", f"c{string}d")), "id", "group")
    encoded = Encoder(tokenizer, template).encode(row)
    special = [i for i in encoded.input_ids if i in tokenizer.all_special_ids]
    assert special == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    text = decode(tokenizer, encoded.input_ids[1:-1])
    assert text == f"### Human: a {string} b### Assistant: c{string}d"
    check_row(row, encoded, tokenizer, template)


# Every data set and every tokenizer by default; all pairs of them in the drill.
LOST = {"oasst1": 3, "alpaca": 0, "sharegpt": 0}
LEDGERS = {("oasst1", "llama"), ("alpaca", "mistral"), ("sharegpt", "phi"), ("oasst1", "pythia")}


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [
        pytest.param(*pair, marks=() if pair in LEDGERS else pytest.mark.drill, id="-".join(pair))
        for pair in itertools.product(LOST, TOKENIZERS)
    ],
    indirect=["tokenizer"],
)
def test_the_ledger_of_a_real_data_set_adds_up(
    real_data: Path, tokenizer: PreTrainedTokenizerBase, name: str, tmp_path: Path
) -> None:
    formats = {"oasst1": "oasst1", "alpaca": "instructions", "sharegpt": "chat"}
    files = {
        "oasst1": "oasst1",
        "alpaca": "instruct/alpaca_en_demo.json",
        "sharegpt": "instruct/sharegpt_500.json",
    }
    spec = PrepareSpec(
        format=formats[name],
        path=str(real_data / files[name]),
        max_seq_len=256,
        max_examples=200,
        overflow="truncate_completion",
        cache_dir=str(tmp_path),
        num_eval_items=5,
    )
    template = load_template("guanaco", bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
    prepared = prepare(spec, tokenizer, template)
    prepared.ledger.check()
    total = prepared.ledger.total
    assert total.read == {"oasst1": 1656, "alpaca": 999, "sharegpt": 500}[name]
    assert total.kept == len(prepared.train) + len(prepared.val)
    assert total.tokens.kept == len(prepared.train.ids) + len(prepared.val.ids)
    assert total.tokens.supervised == prepared.train.supervised.sum() + prepared.val.supervised.sum()
    assert total.dropped["orphan"] == LOST[name]
    assert max(prepared.train.lengths.max(), prepared.val.lengths.max()) <= 256
    assert prepared.val.supervised.min() > 0
    assert prepared.train.supervised.min() > 0
