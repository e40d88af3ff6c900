from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fine_tune.errors import ConfigError
from fine_tune.evaluation import mmlu
from fine_tune.evaluation.mmlu import MMLU, spread
from fine_tune.evaluation.mmlu_data import Prompt, read_csv
from fine_tune.evaluation.protocol import Subject

from ..models.conftest import VOCABULARY, llama
from .test_choices import one_by_one
from .test_mmlu_data import write


def tokenizer() -> PreTrainedTokenizerFast:
    """Characters, folded to fit the model's vocabulary."""
    letters = ["<unk>", "<s>", "</s>", "\n", " ", ":", ".", "?", *"ABCDabcdefghijklmnopqrstuvwxyz01234"]
    raw = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters[:VOCABULARY])}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


@pytest.fixture
def subject() -> Subject:
    model = llama(seed=5).double()
    model.config.max_position_embeddings = 600
    return Subject(model, tokenizer(), None, torch.device("cpu"))  # type: ignore[arg-type]


def scored(evaluation: MMLU, subject: Subject) -> list[dict[str, Any]]:
    items = evaluation.prepare(subject.tokenizer, subject.template)
    found: dict[int, dict[str, Any]] = {}
    for chunk in evaluation.chunks(items):
        found |= zip(chunk, evaluation.score(subject, items, chunk), strict=True)
    return [found[i] for i in range(len(items))]


def test_lines_hold_what_readers_parse(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    evaluation = MMLU(path=str(tmp_path), format="csv")
    lines = scored(evaluation, subject)
    items = evaluation.prepare(subject.tokenizer, subject.template)
    # A subject's questions come together, behind their examples; subjects too, as long as a pass has room for them.
    assert evaluation.chunks(items) == [[0, 1, 2]]
    monkeypatch.setattr(mmlu, "GPU_PASS_TOKENS", 1)
    assert evaluation.chunks(items) == [[0, 1], [2]]
    plain = one_by_one(subject.network, [item.encoded for item in items], 600)  # type: ignore[arg-type]
    for line, item, logps in zip(lines, items, plain, strict=True):
        assert list(line)[:6] == ["id", "prompt", "choice", "target", "correct", "logps"]
        assert list(line["logps"]) == ["A", "B", "C", "D"]
        assert list(line["logps"].values()) == pytest.approx(logps, abs=1e-9)
        assert line["choice"] == max("ABCD", key=lambda letter: line["logps"][letter])
        assert line["correct"] == (line["choice"] == item.target)
        assert (line["id"], line["prompt"], line["cut_tokens"]) == (item.id, item.prompt, 0)
    assert evaluation.groups(lines[2]) == "world_religions"


def test_the_context_is_the_model_s_own_unless_given(subject: Subject, tmp_path: Path) -> None:
    write(tmp_path)
    whole, cut = (MMLU(path=str(tmp_path), format="csv", context_length=n) for n in (None, 90))
    subject.network.config.max_position_embeddings = 90  # type: ignore[union-attr]
    lines = scored(cut, subject)
    assert scored(whole, subject) == lines
    items = cut.prepare(subject.tokenizer, subject.template)
    # Two tokens per choice: the space and the letter.
    assert [line["cut_tokens"] for line in lines] == [len(item.encoded.ids) + 1 - 90 for item in items]
    assert cut.metrics(lines)["num_cut"] == 3
    plain = one_by_one(subject.network, [item.encoded for item in items], 90)  # type: ignore[arg-type]
    for line, logps in zip(lines, plain, strict=True):
        assert list(line["logps"].values()) == pytest.approx(logps, abs=1e-9)


def test_metrics_by_hand() -> None:
    def line(subject: str, category: str, choice: str, target: str, prompt: str = "x\n\ny") -> dict[str, Any]:
        ids = {letter: [i] for i, letter in enumerate("ABCD")}
        return {
            "subject": subject, "category": category, "choice": choice, "target": target, "correct": choice == target,
            "cut_tokens": 0, "token_ids": ids, "prompt": prompt,
        }  # fmt: skip

    lines = [
        line("virology", "other", "A", "A"),
        line("virology", "other", "A", "B"),
        line("virology", "other", "B", "B", "z\n\ny"),
        line("anatomy", "other", "C", "B"),
        line("astronomy", "STEM", "D", "D"),
    ]
    metrics = MMLU(path="x").metrics(lines)
    assert metrics["accuracy"] == 3 / 5
    assert metrics["accuracy_macro"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert metrics["by_category"] == {
        "STEM": {"num_items": 1, "accuracy": 1.0},
        "other": {"num_items": 4, "accuracy": 0.5},
    }
    assert list(metrics["by_category"]) == ["STEM", "other"]
    assert metrics["by_subject"]["virology"] == {"num_items": 3, "accuracy": 2 / 3, "num_prefixes": 2}
    assert metrics["by_subject"]["anatomy"]["num_prefixes"] == 1
    assert metrics["choices"] == {"A": 2, "B": 1, "C": 1, "D": 1}
    assert metrics["token_ids"] == {"A": [[0]], "B": [[1]], "C": [[2]], "D": [[3]]}


def test_the_note_names_the_scored_tokens(tmp_path: Path) -> None:
    write(tmp_path)
    evaluation = MMLU(path=str(tmp_path), format="csv", shots=0)
    note = evaluation.note(evaluation.prepare(tokenizer(), None), tokenizer())  # type: ignore[arg-type]
    assert "A 4 ' '+8 'A'; B 4 ' '+9 'B'" in note
    assert "2 different prefixes (up to a prompt's last empty line), more than one in 0 of 2 subjects" in note


def test_a_prefix_ends_at_the_last_empty_line(tmp_path: Path) -> None:
    file = write(tmp_path) / "val" / "virology_val.csv"
    file.write_text('"One line\n\nand another?",1,2,3,4,A\nWhich?,1,2,3,4,B\nWho?,1,2,3,4,C\n')
    evaluation = MMLU(path=str(tmp_path), format="csv")
    note = evaluation.note(evaluation.prepare(tokenizer(), None), tokenizer())  # type: ignore[arg-type]
    assert "3 different prefixes (up to a prompt's last empty line), more than one in 1 of 2 subjects; 2 groups" in note


def test_modes_and_random_state_come_back(subject: Subject, tmp_path: Path) -> None:
    write(tmp_path)
    subject.network.train()
    torch.manual_seed(1)
    random.seed(1)
    before = torch.get_rng_state(), random.getstate()
    scored(MMLU(path=str(tmp_path), format="csv"), subject)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert all(module.training for module in subject.network.modules())


def test_some_questions_are_spread_over_all_subjects(tmp_path: Path) -> None:
    prompts = [Prompt(f"{s}/{i}", s, "", "A") for s in "abcde" for i in range(20)]
    assert [p.id for p in spread(prompts, 5)] == ["a/0", "b/0", "c/0", "d/0", "e/0"]
    assert len({p.id for p in spread(prompts, 33)}) == 33
    assert spread(prompts, None) == spread(prompts, 1000) == prompts
    write(tmp_path)
    found = MMLU(path=str(tmp_path), format="csv", num_items=2).prepare(tokenizer(), None)  # type: ignore[arg-type]
    assert [item.id for item in found] == [read_csv(str(tmp_path), shots=5, split="val")[i].id for i in (0, 1)]


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"eval.format=xml: unknown. Choose one of json, csv, hub."):
        MMLU(path="x", format="xml")
    with pytest.raises(ConfigError, match=r"eval.path=null: eval.format=csv reads files"):
        MMLU(format="csv")
