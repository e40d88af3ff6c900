"""Preference runs start where they say: at their reference, seen in the metrics and refused otherwise."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import rich
import torch
from safetensors.torch import load_file

import fine_tune
from fine_tune.cli.train import main
from fine_tune.errors import CheckpointError, DataError

from .conftest import read_metrics, small_job, small_pairs_job, stop_in_this_process, write_model, write_pairs

LN_2, BETA = math.log(2), 0.1
SIDES = ("chosen", "rejected")


def lora_b(file: Path) -> list[torch.Tensor]:
    return [tensor for name, tensor in load_file(str(file)).items() if "lora_B" in name]


@pytest.fixture(scope="module")
def from_base(pair_stand_in: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("from_base") / "run"
    fine_tune.train(small_pairs_job(pair_stand_in, run_dir, "objective.reference=base"))
    return run_dir


@pytest.fixture(scope="module")
def from_sft(pair_stand_in: tuple[Path, Path], sft_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("from_sft") / "run"
    fine_tune.train(small_pairs_job(pair_stand_in, run_dir, f"init_from={sft_run}"))
    return run_dir


def assert_starts_at_its_reference(run_dir: Path, *, loss: float = LN_2) -> None:
    lines = read_metrics(run_dir)
    assert lines[0]["step"] == 0
    assert lines[0]["val/loss"] == pytest.approx(loss, abs=1e-6)
    assert lines[1]["train/loss"] == pytest.approx(loss, abs=1e-6)
    for line, stage in ((lines[0], "val"), (lines[1], "train")):
        for name in ("chosen", "rejected", "margins"):
            assert line[f"{stage}/rewards/{name}"] == 0.0, (stage, name)
        assert line[f"{stage}/rewards/accuracies"] == 0.5
    assert lines[0]["val/kl"] == pytest.approx(0.0, abs=1e-12)


def test_from_an_sft_adapter_that_moved(from_sft: Path, from_base: Path, sft_run: Path) -> None:
    assert_starts_at_its_reference(from_sft)
    start = sft_run / "adapter" / "adapter_model.safetensors"
    assert all(tensor.abs().max() > 1e-3 for tensor in lora_b(start)), "a fresh adapter would prove nothing"
    one, other = read_metrics(from_sft)[0], read_metrics(from_base)[0]
    assert abs(one["val/logps/chosen"] - other["val/logps/chosen"]) > 0.01, "the start is the SFT adapter, not the base"


def test_from_the_base_without_an_adapter(from_base: Path) -> None:
    assert_starts_at_its_reference(from_base)
    config = (from_base / "config.yaml").read_text(encoding="utf-8")
    assert "quant_type: nf4" in config
    assert "init_from: null" in config


@pytest.mark.parametrize(
    "more",
    [["method=lora"], pytest.param(["method=dora"], marks=pytest.mark.drill), ["method=qlora8"]],
    ids=lambda more: more[0],
)
def test_initial_without_an_adapter_is_the_base(
    pair_stand_in: tuple[Path, Path], tmp_path: Path, more: list[str]
) -> None:
    words = small_pairs_job(pair_stand_in, tmp_path / "run", *more, "trainer.max_steps=2", "callbacks.preview=null")
    fine_tune.train(words)
    assert_starts_at_its_reference(tmp_path / "run")


@pytest.mark.parametrize(
    ("more", "loss"),
    [
        (["objective.loss=ipo"], 1 / (4 * BETA**2)),
        # tests/unit/modules/test_dpo.py has them all.
        pytest.param(["objective.loss=hinge"], 1.0, marks=pytest.mark.drill),
        (["objective.loss=robust", "objective.label_smoothing=0.2"], LN_2),
        pytest.param(["objective.label_smoothing=0.2"], LN_2, marks=pytest.mark.drill),
    ],
)
def test_every_loss_starts_at_its_own_value(
    pair_stand_in: tuple[Path, Path], sft_run: Path, tmp_path: Path, more: list[str], loss: float
) -> None:
    words = [f"init_from={sft_run}", "trainer.max_steps=1", "callbacks.preview=null", *more]
    fine_tune.train(small_pairs_job(pair_stand_in, tmp_path / "run", *words))
    assert_starts_at_its_reference(tmp_path / "run", loss=loss)


def test_the_reference_stays_where_the_run_began(from_sft: Path) -> None:
    """A reward is beta times what a completion gained since step 0, at every validation."""
    lines = [line for line in read_metrics(from_sft) if "val/loss" in line]
    assert [line["step"] for line in lines] == [0, 3, 6, 9]
    for line in lines[1:]:
        for side in SIDES:
            gained = line[f"val/logps/{side}"] - lines[0][f"val/logps/{side}"]
            assert line[f"val/rewards/{side}"] == pytest.approx(BETA * gained, abs=1e-6), (line["step"], side)
        margin = line["val/rewards/chosen"] - line["val/rewards/rejected"]
        assert line["val/rewards/margins"] == pytest.approx(margin, abs=1e-12)
    assert abs(lines[-1]["val/rewards/margins"]) > 0.01


def planted(kind: str, sft_run: Path) -> list[str]:
    """Ways to name a reference that is not what training starts from."""
    earlier = sft_run / "checkpoints" / "step-0000003"
    return {
        "another adapter": [f"init_from={sft_run}", f"objective.reference={earlier}"],
        "an adapter for a start from the base": [f"objective.reference={sft_run}"],
    }[kind]


def test_the_base_as_reference_of_another_start_is_refused_at_once(
    pair_stand_in: tuple[Path, Path], sft_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"init_from={sft_run}", "objective.reference=base"]
    assert main(small_pairs_job(pair_stand_in, tmp_path / "run", *words)) == 2
    told = capsys.readouterr().err
    assert f"objective.reference = base: training starts from init_from={sft_run}" in told
    assert "objective.reference=initial, or objective.allow_other_start=true" in told
    assert not (tmp_path / "run").exists(), "before anything is read or loaded"


@pytest.mark.parametrize("kind", ["another adapter", "an adapter for a start from the base"])
def test_a_wrong_reference_stops_before_any_update(
    pair_stand_in: tuple[Path, Path],
    sft_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    updates: list[Any] = []
    update = torch.optim.AdamW.step

    def counted(*args: Any, **more: Any) -> Any:
        # What runs before the update is handed to it as a closure: it may raise in there.
        found = update(*args, **more)
        updates.append(0)
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    run_dir, words = tmp_path / "run", planted(kind, sft_run)
    reference = next((word.partition("=")[2] for word in words if word.startswith("objective.reference=")), "")
    assert main(small_pairs_job(pair_stand_in, run_dir, "trainer.max_steps=1", "callbacks.preview=null", *words)) == 2
    told = capsys.readouterr().err
    assert "step 0: the policy is not its reference: a reward is " in told
    assert f"objective.reference={reference} must be what training starts from" in told
    assert "objective.reference=initial, or objective.allow_other_start=true" in told
    assert not updates
    assert not list(run_dir.glob("checkpoints/step-*"))
    assert [line["step"] for line in read_metrics(run_dir)] == [0]
    # The same words with leave to start elsewhere: the refusal above was the gate's, and an update would be seen.
    again = [*words, "objective.allow_other_start=true", "overwrite=true"]
    assert main(small_pairs_job(pair_stand_in, run_dir, "trainer.max_steps=1", "callbacks.preview=null", *again)) == 0
    assert updates


def test_another_start_by_leave_is_measured_from_the_named_reference(
    pair_stand_in: tuple[Path, Path], sft_run: Path, from_sft: Path, from_base: Path, tmp_path: Path
) -> None:
    words = [f"init_from={sft_run}", "objective.reference=base", "objective.allow_other_start=true"]
    fine_tune.train(small_pairs_job(pair_stand_in, tmp_path / "run", *words, "trainer.max_steps=1", "callbacks.preview=null"))
    found, policy, base = (read_metrics(run)[0] for run in (tmp_path / "run", from_sft, from_base))
    for side in SIDES:
        gained = policy[f"val/logps/{side}"] - base[f"val/logps/{side}"]
        assert found[f"val/rewards/{side}"] == pytest.approx(BETA * gained, abs=1e-6)
    assert abs(found["val/rewards/margins"]) > 1e-3
    assert found["val/kl"] > 1e-3


def test_a_folder_that_is_the_start_is_as_good_as_initial(
    pair_stand_in: tuple[Path, Path], sft_run: Path, from_sft: Path, tmp_path: Path
) -> None:
    last = sft_run / "checkpoints" / "step-0000004"
    fine_tune.train(
        small_pairs_job(pair_stand_in, tmp_path / "run", f"init_from={sft_run}", f"objective.reference={last}")
    )
    assert read_metrics(tmp_path / "run") == read_metrics(from_sft)


@pytest.mark.parametrize("key", ["init_from", "objective.reference"])
def test_an_adapter_of_another_base_of_the_same_shape_is_refused(
    pair_stand_in: tuple[Path, Path], sft_run: Path, tmp_path: Path, key: str
) -> None:
    model = write_model(tmp_path / "model", seed=1)
    words = small_pairs_job((model, pair_stand_in[1]), tmp_path / "run", f"{key}={sft_run}")
    with pytest.raises(CheckpointError, match="base") as refused:
        fine_tune.train(words)
    assert str(sft_run) in str(refused.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_adapter_of_another_rank_is_refused(pair_stand_in: tuple[Path, Path], sft_run: Path, tmp_path: Path) -> None:
    words = small_pairs_job(pair_stand_in, tmp_path / "run", f"init_from={sft_run}", "method.rank=4")
    with pytest.raises(CheckpointError, match=r"rank") as refused:
        fine_tune.train(words)
    assert refused.value.exit_code == 4


def test_warnings_come_once_each_even_over_a_resume(
    pair_stand_in: tuple[Path, Path],
    sft_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [
        f"init_from={sft_run}",
        "callbacks.preferences.max_chosen_drop=1e-6",
        "callbacks.preferences.max_margin=1e-6",
    ]
    run_dir = tmp_path / "run"
    stop_in_this_process(5, monkeypatch, small_pairs_job(pair_stand_in, run_dir, *words))
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("warning at step") == 2
    assert "the chosen answers have become less likely themselves, by " in told
    assert "(bound callbacks.preferences.max_chosen_drop=1e-06)" in told
    assert "reward margins have exploded to " in told
    assert "(bound callbacks.preferences.max_margin=1e-06)" in told
    fine_tune.train([f"resume={run_dir}"])
    assert "warning at step" not in capsys.readouterr().out


def test_an_ordinary_run_and_an_sft_run_warn_of_nothing(
    pair_stand_in: tuple[Path, Path], stand_in: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bounds = ["callbacks.preferences.max_chosen_drop=1e-6", "callbacks.preferences.max_margin=1e-6"]
    fine_tune.train(small_job(stand_in, tmp_path / "sft", "trainer.max_steps=3", *bounds))
    fine_tune.train(small_pairs_job(pair_stand_in, tmp_path / "run", "trainer.max_steps=3"))
    assert "warning at step" not in capsys.readouterr().out


FLAWED = (
    ("identical_pair", {"prompt": "w1 w2", "chosen": "w3", "rejected": "w3 "}),
    ("empty_side", {"prompt": "w1 w3", "chosen": "w3", "rejected": ""}),
    ("tie", {"prompt": "w1 w4", "chosen": "w3", "rejected": "w4", "score_chosen": 3, "score_rejected": 3}),
)


def flawed_pairs(file: Path) -> Path:
    """The usual pairs, and one more of each flaw; the first pair comes again, as it is and the wrong way round."""
    write_pairs(file)
    first = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
    swapped = {**first, "chosen": first["rejected"], "rejected": first["chosen"]}
    rows = [first, swapped, *(row for _, row in FLAWED)]
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return file


@pytest.mark.parametrize("columns", [80, pytest.param(120, marks=pytest.mark.drill)])
def test_the_ledger_counts_every_flaw(
    pair_stand_in: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
) -> None:
    monkeypatch.setattr(rich.get_console(), "_width", columns)
    flawed = (pair_stand_in[0], flawed_pairs(tmp_path / "pairs.jsonl"))
    words = ["trainer.max_steps=1", "callbacks.preview=null", "data.max_lost_share=0.2"]
    fine_tune.train(small_pairs_job(flawed, tmp_path / "run", *words))
    reasons = {"duplicate", "conflicting_pair", *(reason for reason, _ in FLAWED)}
    ledger = json.loads((tmp_path / "run" / "data_ledger.json").read_text(encoding="utf-8"))
    assert ledger["dropped"] == dict.fromkeys(reasons, 1)
    assert (ledger["read"], ledger["kept"]) == (50, 45)
    shown = capsys.readouterr().out
    assert [reason for reason in reasons if reason not in shown] == []
    assert "Length bias of" in " ".join(shown.split())


def test_lint_can_stop_a_run(pair_stand_in: tuple[Path, Path], tmp_path: Path) -> None:
    flawed = (pair_stand_in[0], flawed_pairs(tmp_path / "pairs.jsonl"))
    with pytest.raises(DataError, match=r"data\.lint=error: 5 flawed pair") as refused:
        fine_tune.train(small_pairs_job(flawed, tmp_path / "run", "data.lint=error"))
    assert refused.value.exit_code == 3
    assert all(f"1 {reason}, for example" in str(refused.value) for reason, _ in FLAWED)


def test_lint_can_only_report(
    pair_stand_in: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flawed = (pair_stand_in[0], flawed_pairs(tmp_path / "pairs.jsonl"))
    words = ["trainer.max_steps=1", "callbacks.preview=null", "data.lint=report"]
    fine_tune.train(small_pairs_job(flawed, tmp_path / "run", *words))
    ledger = json.loads((tmp_path / "run" / "data_ledger.json").read_text(encoding="utf-8"))
    assert ledger["dropped"] == {"empty_side": 1}, "there is no text to score in that one alone"
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"1 {reason}" in shown for reason in ("identical_pair", "tie", "duplicate", "conflicting_pair"))
