from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from fine_tune.evaluation.mmlu import MMLU, MMLUItem
from fine_tune.evaluation.mmlu_data import CATEGORY_OF, Prompt, read_csv, read_json
from fine_tune.evaluation.protocol import Subject
from fine_tune.models.base import BaseSpec, load_base

from .test_choices import gap, one_by_one

pytestmark = pytest.mark.real
CONTEXT = 5120
# QLoRA left examples out where a prompt was over 2048 LLaMA tokens.
SHORTENED = {"high_school_european_history", "high_school_us_history", "high_school_world_history", "professional_law"}


@pytest.fixture(scope="module")
def subject(real_data: Path) -> Subject:
    folder = real_data / "weights" / "stories260K"
    device = torch.device("cpu")
    network = load_base(BaseSpec(folder, 16, torch.float32, torch.float32, device))
    return Subject(network, AutoTokenizer.from_pretrained(str(folder)), None, device)  # type: ignore[arg-type]


def num_shots(prompt: Prompt) -> int:
    return sum(prompt.prompt.count(f"\nAnswer: {letter}\n\n") for letter in "ABCD")


def test_zero_shot_prompts_are_the_same(real_data: Path) -> None:
    ready = read_json(str(real_data / "mmlu"), shots=0, split="val")
    assert len(ready) == 1531
    assert {prompt.subject for prompt in ready} == set(CATEGORY_OF)
    assert read_csv(str(real_data / "mmlu" / "csv"), shots=0, split="val") == ready


def test_five_shot_prompts_are_the_same_up_to_the_examples_left_out(real_data: Path) -> None:
    ready = read_json(str(real_data / "mmlu"), shots=5, split="val")
    by_shots = {n: read_csv(str(real_data / "mmlu" / "csv"), shots=n, split="val") for n in range(6)}
    assert [by_shots[num_shots(prompt)][i] for i, prompt in enumerate(ready)] == ready
    fewer = [prompt for prompt in ready if num_shots(prompt) < 5]
    assert len(fewer) == 56
    assert {prompt.subject for prompt in fewer} == SHORTENED


@pytest.fixture(scope="module")
def five(real_data: Path, subject: Subject) -> tuple[MMLU, list[MMLUItem]]:
    """Encoding all of it takes seconds."""
    evaluation = MMLU(path=str(real_data / "mmlu"), shots=5, context_length=CONTEXT)
    return evaluation, evaluation.prepare(subject.tokenizer, subject.template)


@pytest.mark.drill
def test_every_question_is_in_one_chunk_of_its_subject(five: tuple[MMLU, list[MMLUItem]], subject: Subject) -> None:
    evaluation, items = five
    chunks = evaluation.chunks(items)
    assert sorted(i for chunk in chunks for i in chunk) == list(range(1531))
    assert all(len({items[i].subject for i in chunk}) == 1 for chunk in chunks)
    per_subject = Counter(items[chunk[0]].subject for chunk in chunks)
    assert set(per_subject) == set(CATEGORY_OF)
    # Shortened prompts begin like the others for as long as they have examples; not all are worth a group of their own.
    assert {name for name, count in per_subject.items() if count > 1} == SHORTENED - {"high_school_us_history"}
    scored, prefixes = evaluation.note(items, subject.tokenizer).splitlines()
    assert scored.endswith("A 410 '\u2581'+447 'A'; B 368 '\u2581B'; C 410 '\u2581'+457 'C'; D 410 '\u2581'+455 'D'")
    # The four with shortened prompts, and two with questions that hold an empty line.
    assert "96 different prefixes (up to a prompt's last empty line), more than one in 6 of 57 subjects" in prefixes


@pytest.mark.drill
@pytest.mark.parametrize("name", ["abstract_algebra", "high_school_european_history"])
def test_scores_equal_one_by_one(five: tuple[MMLU, list[MMLUItem]], subject: Subject, name: str) -> None:
    evaluation, items = five
    chunk = next(chunk for chunk in evaluation.chunks(items) if items[chunk[0]].subject == name)[:3]
    lines = evaluation.score(subject, items, chunk)
    plain = one_by_one(subject.network, [items[i].encoded for i in chunk], CONTEXT)  # type: ignore[arg-type]
    assert gap([list(line["logps"].values()) for line in lines], plain) < 1e-4
    assert [line["choice"] for line in lines] == ["ABCD"[max(range(4), key=logps.__getitem__)] for logps in plain]
