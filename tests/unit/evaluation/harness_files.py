"""Task files of lm-evaluation-harness over a few local rows, and a network small enough to ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedTokenizerFast

from fine_tune.evaluation.harness import Harness
from fine_tune.evaluation.protocol import Subject
from fine_tune.text.template import ChatTemplate

from ..models.conftest import llama, word_tokenizer

NUM_ROWS = 7
ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
PICK = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{q}}",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [ACCURACY, {**ACCURACY, "metric": "acc_norm"}],
}
WRITE = {
    "output_type": "generate_until",
    "doc_to_text": "{{q}}",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["k"], "max_gen_toks": 12},
    "metric_list": [{**ACCURACY, "metric": "exact_match"}],
}
ROLL = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [
        {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
        {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
    ],
}
LAST_WORD = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{q}}",
    "doc_to_target": " {{choices[2]}}",
    "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}, ACCURACY],
}
TASKS = {"pick": PICK, "write": WRITE, "roll": ROLL, "last_word": LAST_WORD}


def write_tasks(folder: Path, **tasks: dict[str, Any]) -> Path:
    """Write rows and one file per task; the tasks of ``TASKS`` by default."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        # The last question is longer than the context, and so are the later texts.
        {
            "q": f"a b {chr(97 + i)} c ?" if i < NUM_ROWS - 1 else "a b c d e f g h " * 9 + "?",
            "choices": ["d e", "f", "g h i"],
            "gold": i % 3,
            "text": "a b c d e f g " * (1 + 2 * i) + "h",
        }
        for i in range(NUM_ROWS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(folder / "rows.jsonl"), "cache_dir": str(folder / "cache")},
        "test_split": "train",
    }
    for name, task in (tasks or TASKS).items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **task}))
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(*"abcdefghijklmnopqrstuvwxyz?", "<pad>", "<end>", "user", "assistant", pad_token="<pad>")


def template() -> ChatTemplate:
    source = (
        "{{ bos_token }}{% for m in messages %} {{ m.role }} {{ m.content }} {{ end_of_turn }}{% endfor %}"
        "{% if add_generation_prompt %} assistant {% endif %}"
    )
    return ChatTemplate(source, "plain", "<end>", bos_token="<s>", eos_token="</s>")


def subject(network: torch.nn.Module | None = None, *, base: bool = False) -> Subject:
    network = llama(seed=3) if network is None else network
    return Subject(network, tokenizer(), template(), torch.device("cpu"), base=base)


def lines_of(evaluation: Harness, asked: Subject) -> list[dict[str, Any]]:
    """Score every chunk and return the lines as a file would give them back."""
    items = evaluation.prepare(asked.tokenizer, asked.template)
    found: dict[int, dict[str, Any]] = {}
    for chunk in evaluation.chunks(items):
        found |= zip(chunk, evaluation.score(asked, items, chunk), strict=True)
    return [json.loads(json.dumps(found[i])) for i in range(len(items))]
