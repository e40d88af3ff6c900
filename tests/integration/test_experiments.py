"""Every experiment runs: two steps on stand-ins for its model and data, everything else as it is written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fine_tune
from fine_tune.config import check_config, find_conf_dir
from fine_tune.errors import ConfigError, FineTuneError

from .conftest import read_metrics, write_pairs, write_rows

EXPERIMENTS = sorted(file.stem for file in (find_conf_dir() / "experiment").glob("*.yaml"))
NUM_ROWS = 60


def message_table(file: Path) -> None:
    lines = []
    for tree in range(NUM_ROWS):
        shared = {"lang": "en", "deleted": False, "message_tree_id": f"t{tree}", "synthetic": False}
        lines.append(
            {
                "message_id": f"p{tree}",
                "parent_id": None,
                "role": "prompter",
                "text": f"w1 w{tree % 50}",
                "rank": None,
                **shared,
            }
        )
        lines.append(
            {
                "message_id": f"a{tree}",
                "parent_id": f"p{tree}",
                "role": "assistant",
                "text": "w2 w3",
                "rank": 0,
                **shared,
            }
        )
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


def inst_text(file: Path) -> None:
    lines = [json.dumps({"text": f"<s>[INST] w1 w{i % 50} [/INST] w2 w3 </s>"}) for i in range(NUM_ROWS)]
    file.write_text("\n".join(lines), encoding="utf-8")


def instruction_rows(file: Path) -> None:
    lines = [json.dumps({"instruction": f"w1 w{i}", "context": "w4", "response": "w2 w3"}) for i in range(NUM_ROWS)]
    file.write_text("\n".join(lines), encoding="utf-8")


WRITERS: dict[str, Callable[[Path], object]] = {
    "oasst1": message_table,
    "guanaco_llama2": inst_text,
    "instructions": instruction_rows,
    "chat": write_rows,
    "preferences": write_pairs,
}
FIRST_HALF, SECOND_HALF = "llama2_instruct_22k", "llama2_dpo_33k"


def test_the_studies_are_there() -> None:
    assert len(EXPERIMENTS) >= 5


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != SECOND_HALF])
def test_it_runs_two_steps(
    name: str, stand_in: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    summary, cfg = two_steps(name, stand_in[0], tmp_path, run_name="run")
    assert summary["steps"] == 2
    assert summary["method"] == cfg["method"]["name"]
    losses = [line["train/loss"] for line in read_metrics(tmp_path / "runs" / "run") if "train/loss" in line]
    assert len(losses) == 2
    assert all(0 < loss < 10 for loss in losses)


def two_steps(name: str, model: Path, folder: Path, *, run_name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run two steps of an experiment on stand-ins; return its summary and its config."""
    rows = folder / f"{name}.jsonl"
    cfg = composed(name, rows)
    WRITERS[cfg["data"]["format"]](rows)
    summary = fine_tune.train(
        [
            f"experiment={name}", f"model.path={model}", "model.dtype=float32", f"data.path={rows}",
            f"data.cache_dir={folder / 'cache'}", "trainer=cpu", "trainer.max_steps=2",
            "optim.global_batch_size=4", "callbacks.preview.max_new_tokens=4", "data.max_new_tokens=4",
            f"run_name={run_name}", *(["model.end_of_turn=null"] if cfg["model"]["end_of_turn"] else []),
        ]
    )  # fmt: skip
    return summary, cfg


def test_the_second_half_of_the_33k_study_starts_at_the_first_ones_adapter(
    stand_in: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # it names the run that it starts from relative to where it is started
    two_steps(FIRST_HALF, stand_in[0], tmp_path, run_name="sft")
    summary, cfg = two_steps(SECOND_HALF, stand_in[0], tmp_path, run_name="dpo")
    assert (summary["steps"], summary["objective"], summary["method"]) == (2, "dpo", "qlora")
    assert cfg["init_from"] == "runs/sft"
    assert cfg["data"]["max_examples"] == 33_100
    assert cfg["objective"]["reference"] == "initial"
    first = next(line for line in read_metrics(tmp_path / "runs" / "dpo") if "train/loss" in line)
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["train/rewards/margins"] == 0.0
    start = load_file(str(tmp_path / "runs/sft/adapter/adapter_model.safetensors"))
    assert any(tensor.abs().max() > 0 for key, tensor in start.items() if "lora_B" in key), "the first half moved"
    kept = load_file(str(tmp_path / "runs/dpo/reference/values.safetensors"))
    assert len(kept) == len(start)
    for key, tensor in start.items():
        assert torch.equal(kept[key.replace(".weight", ".default.weight")], tensor), key


def test_the_second_half_says_what_it_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "pairs.jsonl")
    words = [f"experiment={SECOND_HALF}", "data.path=pairs.jsonl", f"data.cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(FineTuneError, match=r"init_from=runs/sft"):
        fine_tune.train([*words, "model=tiny", "trainer=cpu", "data.max_seq_len=256"])


def composed(name: str, rows: Path) -> dict:
    rows.touch()
    return check_config([f"experiment={name}", f"data.path={rows}"]).cfg


def test_what_a_study_does_not_name_stays_open_with_a_hint() -> None:
    for name in (FIRST_HALF, SECOND_HALF, "mistral_instruct"):
        with pytest.raises(ConfigError) as refused:
            check_config([f"experiment={name}"])
        (problem,) = refused.value.problems
        assert problem.startswith("data.path: no value")
        assert len(problem) > 60, "the hint says which rows"
