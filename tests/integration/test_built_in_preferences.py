"""`python train.py objective=dpo init_from=<the built-in SFT run>`: what the README's second command promises."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from fine_tune.world.tasks import preference_rows

from .built_in import built_in_job, load_quantised
from .conftest import read_metrics, spawn

# The first test waits for the run that this one starts from.
pytestmark = pytest.mark.timeout(600)
BETA = 0.3  # of the built-in recipe


@pytest.fixture(scope="module")
def run_dir(repository: Path, built_in_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built_in_preferences") / "run"
    done = built_in_job(repository, folder, "objective=dpo", f"init_from={built_in_run}")
    assert done.returncode == 0, done.stderr
    for row in ("exact match, at the start", "completion length, tuned", "preference accuracy", "KL to the reference"):
        assert row in done.stdout, row
    return folder


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))


def items(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "items.jsonl").read_text(encoding="utf-8").splitlines()]


def test_it_prefers_what_is_brief_and_right_and_stays_right(run_dir: Path, built_in_run: Path) -> None:
    found, start = summary(run_dir), summary(built_in_run)
    assert found["preference_accuracy"] >= 0.9
    assert found["mean_completion_tokens"] <= 0.7 * start["mean_completion_tokens"]
    assert found["exact_match"] >= start["exact_match"] - 0.02
    assert found["base_exact_match"] <= 0.10


def test_both_runs_answer_the_same_questions(run_dir: Path, built_in_run: Path) -> None:
    before = items(built_in_run / "eval/held_out")
    assert len(before) == 200
    after = {who: items(run_dir / "eval" / who) for who in ("held_out", "held_out_initial", "held_out_base")}
    for found in after.values():
        for key in ("id", "prompt", "target"):
            assert [item[key] for item in found] == [item[key] for item in before]
    assert after["held_out_initial"] == before, "the start answers as the SFT run ended, word for word"
    assert after["held_out_base"] == items(built_in_run / "eval/held_out_base")
    shorter = sum(new["num_tokens"] < old["num_tokens"] for new, old in zip(after["held_out"], before, strict=True))
    assert shorter > 100, "the mean is not the work of a few"


def test_it_starts_at_its_reference(run_dir: Path) -> None:
    lines = read_metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(71))
    assert lines[0]["val/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[1]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[0]["val/rewards/margins"] == lines[1]["train/rewards/margins"] == 0.0
    assert lines[-1]["val/loss"] < 0.5 * math.log(2)


def summed_logps(model: Any, pairs: list[tuple[list[int], list[int]]]) -> Tensor:
    """Log-probabilities of completions after their prompts, by a plain padded forward with all of its logits."""
    found = []
    for first in range(0, len(pairs), 64):
        part = pairs[first : first + 64]
        rows = [torch.tensor(prompt + completion) for prompt, completion in part]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].double()
        found += [
            row[len(prompt) - 1 : len(prompt) + len(completion) - 1].sum()
            for row, (prompt, completion) in zip(logps, part, strict=True)
        ]
    return torch.stack(found)


def held_out_pairs(tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    end, found = tokenizer.convert_tokens_to_ids("<|end|>"), []
    for row in preference_rows(split="heldout", seed=0, num=256):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": row.prompt}], tokenize=False, add_generation_prompt=True
        )
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        for side in (row.chosen, row.rejected):
            found.append((prompt, [*tokenizer(side, add_special_tokens=False).input_ids, end]))
    return found


def test_plain_peft_finds_the_same_rewards(run_dir: Path, built_in_run: Path, repository: Path) -> None:
    """Nothing of ours: both adapters, transformers and PEFT give the margins and the accuracy that the run reported."""
    model = peft.PeftModel.from_pretrained(
        load_quantised(repository), str(built_in_run / "adapter"), adapter_name="start"
    )
    model.load_adapter(str(run_dir / "adapter"), adapter_name="end")
    pairs = held_out_pairs(AutoTokenizer.from_pretrained(str(run_dir / "adapter")))
    with torch.no_grad():
        model.set_adapter("start")
        reference = summed_logps(model, pairs)
        model.set_adapter("end")
        policy = summed_logps(model, pairs)
    rewards = (BETA * (policy - reference)).view(-1, 2)
    margins = rewards[:, 0] - rewards[:, 1]
    reported = read_metrics(run_dir)[-1]
    assert rewards[:, 0].mean().item() == pytest.approx(reported["val/rewards/chosen"], rel=1e-3)
    assert margins.mean().item() == pytest.approx(reported["val/rewards/margins"], rel=1e-3)
    # One pair at zero may fall either way.
    assert (margins > 0).double().mean().item() == pytest.approx(summary(run_dir)["preference_accuracy"], abs=1 / 256)


@pytest.mark.drill
def test_the_same_seed_gives_the_same_steps(run_dir: Path, built_in_run: Path, tmp_path: Path) -> None:
    """As far as the second run is let: its first eight steps."""
    words = [
        "trainer=cpu",
        "objective=dpo",
        f"init_from={built_in_run}",
        "data.num_eval_items=0",
        "callbacks.preview=null",
    ]
    words.append(f"data.cache_dir={tmp_path / 'cache'}")
    again = spawn([*words, f"run_dir={tmp_path / 'again'}"], stop_step=8)
    assert again.returncode == 143, again.stderr
    assert read_metrics(tmp_path / "again") == read_metrics(run_dir)[:9]


def test_what_a_preference_run_leaves_behind(run_dir: Path) -> None:
    for name in ("config.yaml", "manifest.json", "data_ledger.json", "metrics.jsonl", "summary.json", "previews.jsonl"):
        assert (run_dir / name).stat().st_size > 0, name
    ledger = json.loads((run_dir / "data_ledger.json").read_text(encoding="utf-8"))
    assert ledger["read"] == ledger["kept"] + sum(ledger["dropped"].values())
    found = summary(run_dir)
    assert (found["objective"], found["steps"], found["final_perplexity"]) == ("dpo", 70, None)
    last = read_metrics(run_dir)[-1]
    assert found["preference_accuracy"] == last["val/rewards/accuracies"]
    assert found["final_loss"] == last["val/loss"]
