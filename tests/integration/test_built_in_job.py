"""`python train.py` without arguments: what the README's first command promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from .built_in import built_in_job, load_quantised
from .conftest import read_metrics


@pytest.fixture(scope="module")
def run_dir(built_in_run: Path) -> Path:
    printed = (built_in_run.parent / "stdout.txt").read_text(encoding="utf-8")
    assert "exact match, base" in printed
    assert "exact match, tuned" in printed
    return built_in_run


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))


def test_the_base_cannot_answer_and_the_adapter_can(run_dir: Path) -> None:
    found = summary(run_dir)
    assert found["base_exact_match"] <= 0.10
    assert found["exact_match"] >= 0.80
    items = [json.loads(line) for line in (run_dir / "eval/held_out/items.jsonl").read_text().splitlines()]
    assert len(items) == 200
    assert sum(item["correct"] for item in items) / 200 == pytest.approx(found["exact_match"])


def test_validation_loss_falls_and_every_step_has_its_line(run_dir: Path) -> None:
    lines = read_metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(101))
    assert set(lines[1]) >= {"step", "train/loss", "learning_rate", "grad_norm"}
    assert lines[0]["val/loss"] > 3
    assert lines[-1]["val/loss"] < 0.1
    assert summary(run_dir)["final_loss"] == lines[-1]["val/loss"]


@pytest.mark.drill
def test_the_same_seed_gives_the_same_run(run_dir: Path, repository: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    done = built_in_job(repository, again, "trainer.max_steps=100", "data.num_eval_items=0", "callbacks.preview=null")
    assert done.returncode == 0, done.stderr
    assert read_metrics(again) == read_metrics(run_dir)


def test_the_adapter_loads_with_plain_peft_and_says_the_same(run_dir: Path, repository: Path) -> None:
    """Nothing of ours: transformers, PEFT and the adapter folder answer the held-out questions as the run did."""
    model = peft.PeftModel.from_pretrained(load_quantised(repository), str(run_dir / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(str(run_dir / "adapter"))
    items = [json.loads(line) for line in (run_dir / "eval/held_out/items.jsonl").read_text().splitlines()]
    stop = tokenizer.convert_tokens_to_ids("<|end|>")
    same = 0
    for item in items[:12]:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": item["prompt"]}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False, eos_token_id=stop
        )
        same += tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip() == item["completion"]
    assert same == 12


def test_the_adapter_moved_and_holds_no_base_weight(run_dir: Path) -> None:
    weights = load_file(str(run_dir / "adapter/adapter_model.safetensors"))
    assert len(weights) == 2 * 7 * 4, "A and B of seven linear layers in four blocks"
    for name, tensor in weights.items():
        assert tensor.abs().max() > 0, name
    assert (run_dir / "adapter/adapter_model.safetensors").stat().st_size < 1_200_000


def test_what_a_run_leaves_behind(run_dir: Path) -> None:
    for name in ("config.yaml", "manifest.json", "data_ledger.json", "metrics.jsonl", "summary.json", "previews.jsonl"):
        assert (run_dir / name).stat().st_size > 0, name
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert {
        "versions",
        "git_commit",
        "seed",
        "command",
        "device",
        "data_fingerprint",
        "base_fingerprint",
        "template_hash",
    } <= set(manifest)
    ledger = json.loads((run_dir / "data_ledger.json").read_text())
    assert ledger["read"] == ledger["kept"] + sum(ledger["dropped"].values())
    step = run_dir / "checkpoints/step-0000100"
    assert {file.name for file in step.iterdir()} == {"adapter.safetensors", "trainer.pt", "manifest.json"}
    previews = [json.loads(line) for line in (run_dir / "previews.jsonl").read_text().splitlines()]
    assert {"step", "prompt", "completion", "base_completion"} == set(previews[0])
    assert {line["step"] for line in previews} == {0, 100}
