"""Reference log-probabilities on disk: computed once, shared by runs that would compute the same, refused otherwise."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fine_tune
from fine_tune.callbacks.reference_store import SPOT_CHECKS
from fine_tune.cli.train import main
from fine_tune.interrupts import Interrupted
from fine_tune.modules.dpo import DPOModule
from fine_tune.packing.batches import MicroBatch

from .conftest import read_metrics, small_pairs_job

EPOCH, PAIRS = 6, 41


def watch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Note the rows of every micro-batch that the reference is run on."""
    seen: list[tuple[int, ...]] = []
    compute = DPOModule.reference_logps

    def counting(self: DPOModule, micro: MicroBatch) -> torch.Tensor:
        seen.append(tuple(micro.samples))
        return compute(self, micro)

    monkeypatch.setattr(DPOModule, "reference_logps", counting)
    return seen


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Rows of every micro-batch that the reference was run on."""
    return watch(monkeypatch)


def words_of(pair_stand_in: tuple[Path, Path], sft_run: Path, root: Path, name: str, *more: str) -> list[str]:
    """Words of a run by name, all with one store."""
    place = [f"init_from={sft_run}", f"objective.reference_store={root / 'store'}"]
    short = [f"trainer.max_steps={EPOCH + 1}", "callbacks.checkpoint.every_n_steps=100", "callbacks.preview=null"]
    short.append("trainer.micro_batch_tokens=96")  # three a step
    return small_pairs_job(pair_stand_in, root / name, *place, *short, *more)


@pytest.fixture
def job(pair_stand_in: tuple[Path, Path], sft_run: Path, tmp_path: Path) -> Callable[..., list[str]]:
    return functools.partial(words_of, pair_stand_in, sft_run, tmp_path)


@pytest.fixture(scope="module")
def filled(
    pair_stand_in: tuple[Path, Path], sft_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[tuple[int, ...]]]:
    """The folder of a run of one step and of the store that it filled, and the rows of every micro-batch of that."""
    root = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch:
        seen = watch(patch)
        fine_tune.train(words_of(pair_stand_in, sft_run, root, "one", "trainer.max_steps=1"))
    return root, seen


@pytest.fixture
def one(filled: tuple[Path, list[tuple[int, ...]]], tmp_path: Path) -> list[tuple[int, ...]]:
    """The run ``one`` and the store of ``filled``, in this test's folder."""
    shutil.copytree(filled[0], tmp_path, dirs_exist_ok=True)
    return filled[1]


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "store").glob("*.safetensors"))


def read_store(file: Path) -> tuple[torch.Tensor, dict[str, str]]:
    with safe_open(str(file), framework="pt") as found:
        return found.get_tensor("logps"), found.metadata()


def without_rate(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if key != "learning_rate"} for line in lines]


def test_the_first_run_computes_every_row_once_and_the_next_reads_them(
    job: Callable[..., list[str]], tmp_path: Path, computed: list[tuple[int, ...]]
) -> None:
    fine_tune.train(job("one"))
    assert sorted(row for rows in computed for row in rows) == list(range(PAIRS)), "two epochs, one computation"
    filled = list(computed)
    (file,) = files(tmp_path)
    stored, _ = read_store(file)
    assert stored.shape == (PAIRS, 2)
    assert torch.isfinite(stored).all()
    content = file.read_bytes()
    computed.clear()

    fine_tune.train(job("two", "optim.lr=3e-3", "objective.beta=0.3", "objective.loss=ipo", "trainer.num_workers=1"))
    assert len(computed) == SPOT_CHECKS < len(filled)
    assert set(computed) < set(filled)
    assert file.read_bytes() == content
    assert files(tmp_path) == [file]

    fine_tune.train(job("three", "optim.lr=3e-3"))
    fine_tune.train(job("four", "optim.lr=3e-3", "objective.reference_store=null"))
    one, three, four = (read_metrics(tmp_path / name) for name in ("one", "three", "four"))
    assert without_rate(three[:2]) == without_rate(one[:2])
    assert three[: EPOCH + 1] == four[: EPOCH + 1], "the whole first epoch is as without a store"
    # From the second epoch on rows are packed with others: equal up to the rounding of another shape.
    for left, right in zip(three[EPOCH + 1 :], four[EPOCH + 1 :], strict=True):
        assert left["train/loss"] == pytest.approx(right["train/loss"], abs=1e-5)
        assert left["train/rewards/margins"] == pytest.approx(right["train/rewards/margins"], abs=1e-5)


@pytest.mark.drill
def test_a_shorter_run_fills_a_part_and_a_longer_one_the_rest(
    job: Callable[..., list[str]], tmp_path: Path, computed: list[tuple[int, ...]]
) -> None:
    fine_tune.train(job("short", "trainer.max_steps=2"))
    part = list(computed)
    assert sum(map(len, part)) == 16, "two steps of eight pairs"
    computed.clear()
    fine_tune.train(job("long"))
    spot, rest = computed[: min(SPOT_CHECKS, len(part))], computed[min(SPOT_CHECKS, len(part)) :]
    assert set(spot) <= set(part)
    assert sorted(row for rows in part + rest for row in rows) == list(range(PAIRS))


@pytest.mark.parametrize(
    "more",
    [
        ["trainer.micro_batch_tokens=128"],
        pytest.param(["seed=1"], marks=pytest.mark.drill),
        pytest.param(["optim.global_batch_size=4"], marks=pytest.mark.drill),
        pytest.param(["objective.reference=base", "objective.allow_other_start=true"], marks=pytest.mark.drill),
    ],
    ids=lambda more: more[0],
)
def test_whatever_decides_a_value_names_the_file(
    job: Callable[..., list[str]],
    tmp_path: Path,
    one: list[tuple[int, ...]],
    computed: list[tuple[int, ...]],
    more: list[str],
) -> None:
    before = {file: file.read_bytes() for file in files(tmp_path)}
    assert len(before) == 1
    fine_tune.train(job("two", "trainer.max_steps=1", *more))
    assert len(files(tmp_path)) == 2
    assert all(file.read_bytes() == content for file, content in before.items())
    assert sum(map(len, computed)) == read_metrics(tmp_path / "two")[1]["samples"], "nothing was taken over"


def tamper(file: Path, rows: Sequence[int], *, nats: float, vouched: bool) -> None:
    """Change some rows' values, and if ``vouched`` also the hash that stands for them."""
    values, notes = read_store(file)
    values[list(rows)] += nats
    if vouched:
        notes["sha256"] = hashlib.sha256(values.numpy().tobytes()).hexdigest()
    save_file({"logps": values}, str(file), metadata=notes)


@pytest.mark.parametrize(
    ("nats", "vouched", "reason"),
    [
        (1e-9, False, "its content is not what was saved"),
        # A reward of 1e-4 at beta 0.1: ten times what float32 explains.
        (1e-3, True, "recomputed values of rows "),
    ],
)
def test_changed_values_are_refused_and_the_file_is_named(
    job: Callable[..., list[str]],
    tmp_path: Path,
    one: list[tuple[int, ...]],
    capsys: pytest.CaptureFixture[str],
    nats: float,
    vouched: bool,
    reason: str,
) -> None:
    (file,) = files(tmp_path)
    tamper(file, range(PAIRS), nats=nats, vouched=vouched)
    capsys.readouterr()
    assert main(job("two", "trainer.max_steps=1")) == 4
    told = capsys.readouterr().err
    assert f"objective.reference_store: {file} is refused: {reason}" in told
    assert "Delete that file" in told
    assert not (tmp_path / "two" / "checkpoints").exists()
    file.unlink()
    assert main(job("three", "trainer.max_steps=1")) == 0
    assert read_metrics(tmp_path / "three") == read_metrics(tmp_path / "one")


@pytest.mark.drill
def test_a_wrong_value_that_step_0_meets_is_blamed_on_the_store(
    job: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], computed: list[tuple[int, ...]]
) -> None:
    assert main(job("one")) == 0
    (file,) = files(tmp_path)
    spot_checked = set(computed[:: len(computed) // SPOT_CHECKS])
    unchecked = next(rows for rows in computed[:3] if rows not in spot_checked)
    assert sum(map(len, computed[:2])) < 8, "the second micro-batch belongs to the first step too"
    tamper(file, unchecked[:1], nats=1e-2, vouched=True)
    capsys.readouterr()
    code = main(job("two"))
    told = capsys.readouterr().err
    assert str(file) in told
    assert code == 4


def test_a_missing_value_is_computed(
    job: Callable[..., list[str]], tmp_path: Path, one: list[tuple[int, ...]], computed: list[tuple[int, ...]]
) -> None:
    (file,) = files(tmp_path)
    content, lost = load_file(file)["logps"], one[-1]
    tamper(file, lost[:1], nats=math.nan, vouched=True)
    fine_tune.train(job("two", "trainer.max_steps=1"))
    assert computed[-1] == lost
    torch.testing.assert_close(load_file(file)["logps"], content, rtol=0, atol=0, equal_nan=True)
    assert read_metrics(tmp_path / "two") == read_metrics(tmp_path / "one")


@pytest.mark.drill
def test_a_resumed_run_can_follow_the_advice_of_a_refused_store(
    job: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(job("one", "trainer.max_steps=1")) == 0
    (file,) = files(tmp_path)
    tamper(file, range(PAIRS), nats=1e-9, vouched=False)
    words = [f"resume={tmp_path / 'one'}", "trainer.max_steps=2"]
    assert main(words) == 4
    assert "or set objective.reference_store=null" in capsys.readouterr().err
    assert main([*words, "objective.reference_store=null"]) == 0, capsys.readouterr().err


def test_a_stop_while_filling_keeps_what_was_computed(
    job: Callable[..., list[str]],
    tmp_path: Path,
    computed: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counting, stop_at = DPOModule.reference_logps, 5

    def stopping(self: DPOModule, micro: MicroBatch) -> torch.Tensor:
        if len(computed) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return counting(self, micro)

    with monkeypatch.context() as patch:
        patch.setattr(DPOModule, "reference_logps", stopping)
        with pytest.raises(Interrupted, match="stopped by SIGTERM") as stopped:
            fine_tune.train(job("one"))
    assert stopped.value.exit_code == 143
    part = list(computed)
    assert len(part) == stop_at
    (file,) = files(tmp_path)
    values, _ = read_store(file)
    assert torch.isfinite(values[[row for rows in part for row in rows]]).all()
    assert int(torch.isfinite(values).all(1).sum()) == sum(map(len, part))
    computed.clear()
    fine_tune.train([f"resume={tmp_path / 'one'}"])
    again = computed[SPOT_CHECKS:]
    assert set(computed[:SPOT_CHECKS]) < set(part)
    assert sorted(row for rows in part + again for row in rows) == list(range(PAIRS))
    fine_tune.train(job("two"))
    assert read_metrics(tmp_path / "one") == read_metrics(tmp_path / "two")
