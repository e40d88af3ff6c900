"""`audit` through its door: sound data pass, and what is off is told with exit code 3."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fine_tune.audit.audit import Audit, audit
from fine_tune.cli.main import main
from fine_tune.config import check_config
from fine_tune.data import cache
from fine_tune.data.table import TokenTable
from fine_tune.evaluation.answers import Answerer
from fine_tune.models import base

WORDS = ["q", "r", "one", "two", "two.", "a", "b"]


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No audit loads a model, and none leaves tables in the user's cache."""
    monkeypatch.setattr(
        base.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded")
    )
    monkeypatch.setenv("FINE_TUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def words_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a word-level tokenizer and a config, without weights."""
    folder = tmp_path_factory.mktemp("words")
    known = ["<unk>", "<s>", "</s>", "<pad>", "###", "Human:", "Assistant:", ".", *WORDS]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("###", "isolated")]
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **names).save_pretrained(str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 64}))
    return folder


def rows(file: Path, *talks: tuple[str, ...]) -> str:
    made = [[{"role": ("user", "assistant")[n % 2], "content": said} for n, said in enumerate(talk)] for talk in talks]
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in made), encoding="utf-8")
    return str(file)


def job(model: Path, path: str, *more: str) -> list[str]:
    return [f"model.path={model}", "data=chat", f"data.path={path}", "data.val_share=0.0", "data.max_seq_len=40", *more]


def look(words: list[str], number: int = 1) -> Audit:
    return audit(check_config(words).cfg, number=number)


def outcomes(found: Audit) -> dict[str, str]:
    return {check.name: check.outcome for check in found.checks}


@pytest.mark.parametrize(("objective", "turns"), [("sft", 3256), ("dpo", 4512)])
def test_the_built_in_data_pass(objective: str, turns: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "audit.html"
    assert main(["audit", f"objective={objective}", "rows=1", f"out={page}"]) == 0
    said = capsys.readouterr()
    assert "FAIL" not in said.out
    assert f"{turns:,} of {turns:,} learned turns end in '<|end|>'" in re.sub(r"\s+", " ", said.out)
    assert said.err == f"the page: {page}\n"
    text = page.read_text(encoding="utf-8")
    assert f"fine-tune audit objective={objective} rows=1 out={page}" in text
    assert ("<h4>rejected</h4>" in text) is (objective == "dpo")


def test_pairs_show_both_sides_and_are_compared_with_conversations() -> None:
    found = look(["objective=dpo"])
    assert outcomes(found)["shared prompt"] == outcomes(found)["one prompt"] == "passed"
    for row in found.rows:
        assert [part.title for part in row.parts] == ["prompt", "chosen", "rejected"]
        prompt, *sides = [[token.state for token in part.tokens] for part in row.parts]
        assert set(prompt) == {"masked"}
        assert all(set(side) == {"learned"} for side in sides)
        assert all(part.tokens[-1].text == "<|end|>" for part in row.parts[1:])


def test_an_answer_that_grows_together_with_its_end_fails(
    words_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "grown.jinja"
    template.write_text(
        "{{ bos_token }}{% for m in messages %}{{ '### Human: ' if m.role == 'user' else ' ### Assistant: ' }}{{ m.content }}"
        "{{ end_of_turn if m.role == 'assistant' }}{% endfor %}{{ ' ### Assistant:' if add_generation_prompt }}"
    )
    path = rows(tmp_path / "rows.jsonl", ("q", "two"), ("r", "two"))
    words = job(words_only, path, f"model.chat_template={template}", "model.end_of_turn='.'")
    # As in training, which is refused for it.
    assert main(["audit", *words]) == 3
    said = capsys.readouterr()
    assert "does not end in the learned token '.'" in said.err
    assert "end of turn: 0 of 2 learned turns end in '.': a model trained on them does not stop" in said.err
    # The rows are shown all the same, and the tables of a refused preparation are not kept for a run to find.
    assert "two." in said.out
    assert not list((tmp_path / "cache").glob("*/train.arrow"))
    assert main(["audit", *words]) == 3


def test_a_template_without_an_end_of_turn_is_refused_before_a_row_is_read(
    words_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "endless.jinja"
    template.write_text("{% for m in messages %}{{ m.content + ' ' }}{% endfor %}")
    words = job(words_only, str(tmp_path / "none.jsonl"), f"model.chat_template={template}")
    assert main(["audit", *words]) == 2
    assert "no end-of-turn text '</s>' after the answer" in capsys.readouterr().err


def test_cut_and_dropped_rows_are_shown_with_their_reason(words_only: Path, tmp_path: Path) -> None:
    long = " ".join(["a"] * 30)
    path = rows(tmp_path / "rows.jsonl", ("q", "one"), ("q " + long, "b", "r", "two"), (long + " b", long), ("", "one"))
    found = look(job(words_only, path, "data.overflow=keep_last_turns", "data.max_lost_share=0.9"))
    kinds = {row.kind: row for row in found.rows}
    assert set(kinds) == {"longest", "shortest", "cut by keep_last_turns", "dropped: too_long", "dropped: empty_prompt"}
    cut = kinds["cut by keep_last_turns"]
    assert cut.differences is None
    assert " ".join("".join(t.text for t in cut.parts[0].tokens if t.state == "cut").split()).endswith("b </s>")
    assert {token.state for token in kinds["dropped: too_long"].parts[0].tokens} == {"cut"}
    assert kinds["dropped: empty_prompt"].parts == ()
    assert "empty_prompt" in kinds["dropped: empty_prompt"].note
    assert kinds["longest"].differences in ((), None)


def test_too_many_lost_rows_fail_as_in_training(words_only: Path, tmp_path: Path) -> None:
    path = rows(tmp_path / "rows.jsonl", ("q", "one"), ("q", " ".join(["a"] * 60)))
    [failed] = look(job(words_only, path)).failed
    assert failed.name == "rows"
    assert failed.says.startswith("data.max_lost_share=0.05: 1 of 2 rows (50.0%) would be lost.")


def test_when_no_row_is_left_the_reasons_are_still_shown(words_only: Path, tmp_path: Path) -> None:
    found = look(job(words_only, rows(tmp_path / "rows.jsonl", ("q", " ".join(["a"] * 60)))))
    assert [row.kind for row in found.rows] == ["dropped: too_long"]
    assert "no training row is left" in found.failed[0].says


def test_unknown_words_and_a_doubled_begin_fail(words_only: Path, tmp_path: Path) -> None:
    template = tmp_path / "twice.jinja"
    template.write_text(
        "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ '### Human: ' if m.role == 'user' else ' ### Assistant: ' }}"
        "{{ m.content + ' ' }}{{ end_of_turn if m.role == 'assistant' }}{% endfor %}"
        "{{ ' ### Assistant:' if add_generation_prompt }}"
    )
    path = rows(tmp_path / "rows.jsonl", ("q unheard of", "one"), ("r", "two"))
    found = look(job(words_only, path, f"model.chat_template={template}"))
    assert {check.name for check in found.failed} == {"begin of text", "known tokens"}
    assert outcomes(found)["one prompt"] == "passed"


def test_a_row_longer_than_the_model_fails(words_only: Path, tmp_path: Path) -> None:
    path = rows(tmp_path / "rows.jsonl", ("q", "one"))
    found = look([*job(words_only, path), "data.max_seq_len=65"])
    assert [check.name for check in found.failed] == ["context"]


def test_a_preview_that_asks_in_other_ids_fails(
    words_only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(self: Answerer, conversations: Any, **options: Any) -> Any:
        return self.continue_prompts([[1, *self.encoder.encode_prompt(c)] for c in conversations], **options)

    monkeypatch.setattr(Answerer, "answer", answer)
    found = look(job(words_only, rows(tmp_path / "rows.jsonl", ("q", "one", "r", "two"))))
    [failed] = found.failed
    assert failed.name == "one prompt"
    assert "previews, answer 1: token 1 of" in failed.says
    assert any(problem.startswith("previews, answer 2") for problem in found.rows[0].differences or ())


def change(cache_folder: Path, column: str, place: int, value: int) -> None:
    """Change one value of the first row of the one table that is kept, with its checksum."""
    [manifest] = cache_folder.glob("*/manifest.json")
    file = manifest.with_name("train.arrow")
    arrow = TokenTable.open(file).arrow
    rows = arrow.to_pydict()
    rows[column][0][place] = value
    TokenTable(arrow.from_pydict(rows, schema=arrow.schema)).save(file)
    hashes = {one.name: cache.file_sha256(one) for one in manifest.parent.iterdir() if one != manifest}
    manifest.write_text(json.dumps({"sha256": hashes}))


def test_a_side_that_is_no_conversation_fails(words_only: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"prompt": q, "chosen": "one", "rejected": "two"}) + "\n" for q in ("q", "r")))
    words = [f"model.path={words_only}", "objective=dpo", "data=preferences", f"data.path={file}", "data.val_share=0.0"]
    words += ["data.max_seq_len=40"]
    assert look(words).failed == []
    change(tmp_path / "cache", "input_ids", -2, 5)
    failed = {check.name: check.says for check in look(words).failed}
    assert set(failed) == {"tables", "shared prompt"}
    assert failed["shared prompt"].startswith("pairs.jsonl:1: a side behind its prompt is not the conversation")


def test_a_table_that_the_encoder_does_not_make_fails(words_only: Path, tmp_path: Path) -> None:
    words = job(words_only, rows(tmp_path / "rows.jsonl", ("q", "one"), ("r", "two")))
    assert look(words).failed == []
    change(tmp_path / "cache", "loss_mask", 2, 1)
    failed = {check.name: check.says for check in look(words).failed}
    assert set(failed) == {"tables", "one prompt"}
    assert failed["tables"].startswith("rows.jsonl:1: not what the encoder makes of it")


def test_documents_end_in_the_end_of_text(words_only: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one two", "a b a")))
    words = [f"model.path={words_only}", "data=text", f"data.path={file}", "data.val_share=0.0", "data.max_seq_len=40"]
    # Whatever ends the turns of conversations.
    found = look([*words, "model.end_of_turn='.'"])
    assert found.failed == []
    assert found.account.num_stops == found.account.num_turns == 2
    assert "one prompt" not in outcomes(found)


def test_a_folder_with_nothing_but_a_tokenizer_is_enough(words_only: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in words_only.glob("tokenizer*"):
        (bare / file.name).write_bytes(file.read_bytes())
    found = look(job(bare, rows(tmp_path / "rows.jsonl", ("q", "one"))))
    assert found.failed == []
    assert outcomes(found)["context"] == outcomes(found)["the model's folder"] == "look"


def test_the_pages_command_can_be_typed_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fine_tune.audit import audit as room
    from fine_tune.audit import page, terminal

    written: list[str] = []
    for owner, name in ((room, "audit"), (room, "refuse"), (terminal, "show")):
        monkeypatch.setattr(owner, name, lambda *given, **more: None)
    monkeypatch.setattr(page, "write_page", lambda found, file, *, command: written.append(command))
    words = ["callbacks.preview.prompts=['a b; c']", f"out={tmp_path / 'my page.html'}"]
    assert main(["audit", *words]) == 0
    assert shlex.split(written[0]) == ["fine-tune", "audit", *words]


def test_wrong_words_are_told_together(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["audit", "rows=many", f"out={tmp_path}", "data.pth=x"]) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in ("3 problem(s)", "rows=many", "is a folder", "Did you mean data.path?"))
    assert main(["audit", "--help"]) == 0
    assert "rows=<number>" in capsys.readouterr().out
