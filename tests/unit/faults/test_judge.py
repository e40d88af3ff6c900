"""The judge of the fault scorecard: it must see one changed bit, count lost steps, and know a promise that was not kept."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.faults.catalogue import GROUPS, catalogue, chosen
from benchmarks.faults.damage import flip_bit
from benchmarks.faults.jobs import SFT
from benchmarks.faults.judge import Promise, Verdict, differences, judge
from benchmarks.faults.moments import half_written, last_step, newest_saved
from benchmarks.faults.nursery import VARIANTS, Process
from benchmarks.faults.plain_faults import SHARED, plain_faults
from benchmarks.faults.scene import Scene

KEPT = Promise([(-9,), (0,)], may_lose=2)


def write_run(folder: Path, *, seconds: float = 1.0) -> Path:
    """A finished run of one tensor."""
    checkpoint, adapter = folder / "checkpoints" / "step-0000002", folder / "adapter"
    for place in (checkpoint, adapter):
        place.mkdir(parents=True)
    weights = {"a": torch.linspace(-1, 1, 64)}
    save_file(weights, str(checkpoint / "adapter.safetensors"))
    save_file(weights, str(adapter / "adapter_model.safetensors"))
    state = {
        "step": 2,
        "optimizer": {"exp_avg": torch.ones(4)},
        "callbacks": {"Throughput": {"tokens": 8, "seconds": seconds}},
    }
    torch.save(state, checkpoint / "trainer.pt")
    (checkpoint / "manifest.json").write_text("{}")
    lines = [{"step": step, "train/loss": 1.0 / step, "step_seconds": seconds} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps({"steps": 2, "train_loss": 0.75, "wall_seconds": seconds}))
    return folder


def test_runs_that_differ_in_seconds_alone_are_the_same(tmp_path: Path) -> None:
    assert differences(write_run(tmp_path / "one", seconds=1.0), write_run(tmp_path / "other", seconds=7.0)) == []


def change_optimizer(run: Path) -> None:
    file = run / "checkpoints" / "step-0000002" / "trainer.pt"
    state = torch.load(file, weights_only=True)
    state["optimizer"]["exp_avg"][2] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    torch.save(state, file)


def not_a_number(run: Path) -> None:
    weights = {"a": torch.linspace(-1, 1, 64)}
    weights["a"][3] = float("nan")
    save_file(weights, str(run / "checkpoints" / "step-0000002" / "adapter.safetensors"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda run: flip_bit(run / "adapter" / "adapter_model.safetensors"), ".exported.a"),
        (lambda run: flip_bit(run / "checkpoints" / "step-0000002" / "adapter.safetensors"), ".adapter.a"),
        (not_a_number, ".not finite"),
        (change_optimizer, ".trainer.optimizer.exp_avg"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n'), ".metrics"),
        (lambda run: (run / "summary.json").write_text('{"steps": 3, "train_loss": 0.75}'), ".summary.steps"),
        (lambda run: (run / "adapter" / "adapter_model.safetensors").write_bytes(b"half"), "unreadable"),
    ],
    ids=["exported bit", "checkpoint bit", "NaN", "optimizer", "metrics", "figures", "unreadable"],
)
def test_every_change_of_a_result_is_named(tmp_path: Path, change: Callable[[Path], Any], named: str) -> None:
    clean = write_run(tmp_path / "clean")
    shutil.copytree(clean, tmp_path / "run")
    change(tmp_path / "run")
    found = differences(tmp_path / "run", clean)
    assert found
    assert any(named in line for line in found), found


def test_the_sign_of_zero_is_a_difference(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("one", "other")]
    for run, zero in zip(runs, (0.0, -0.0), strict=True):
        save_file({"a": torch.full((3,), zero)}, str(run / "adapter" / "adapter_model.safetensors"))
    assert differences(*runs) == [".exported.a"]


def test_a_run_without_a_summary_has_no_result(tmp_path: Path) -> None:
    clean = write_run(tmp_path / "clean")
    shutil.copytree(clean, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    assert differences(tmp_path / "run", clean) is None


def verdict(codes: tuple[int, ...] = (-9, 0), told: tuple[str, ...] = ("", ""), **more: Any) -> Verdict:
    given: dict[str, Any] = {"losses": [0, 2], "differences": [], **more}
    return judge(more.pop("promise", KEPT), codes, told, **{key: given[key] for key in given if key != "promise"})


def test_a_promise_that_was_kept() -> None:
    found = verdict()
    assert (found.survived, found.lost, found.wrong, found.reasons) == (True, 2, False, [])


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"codes": (0, 0)}, "start 1 ended with 0 instead of -9"),
        ({"codes": (-9,), "told": ("",)}, "1 starts instead of 2"),
        ({"losses": [0, 3]}, "3 steps were lost at once, 2 may be"),
        ({"differences": None}, "there is no result"),
        ({"differences": [".adapter.a"]}, "differs from the clean run: .adapter.a"),
        ({"notes": ["code of the checkpoint ran"]}, "code of the checkpoint ran"),
        ({"told": ("", "Traceback (most recent call last):\n  oh")}, "start 2: a traceback instead of a message"),
        ({"promise": Promise([(8,), (0,)]), "codes": (8, 0), "losses": []}, "start 1: it failed without a word"),
        (
            {"promise": Promise([(8,), (0,)]), "codes": (8, 0), "losses": [], "told": ("word\n" * 16, "")},
            "start 1: a message of 16 lines",
        ),
        (
            {
                "promise": Promise([(4,), (0,)], says=("base_fingerprint",)),
                "codes": (4, 0),
                "losses": [],
                "told": ("no", ""),
            },
            "no message says 'base_fingerprint'",
        ),
    ],
)
def test_a_promise_that_was_not_kept(given: dict[str, Any], reason: str) -> None:
    found = verdict(**given)
    assert not found.survived
    assert found.reasons == [reason]


def test_only_a_claim_of_success_can_be_wrong() -> None:
    assert verdict(differences=[".adapter.a"]).wrong
    refused = judge(Promise([(4,)], finished=False), [4], ["refused"], losses=[], differences=[".adapter.a"])
    assert (refused.survived, refused.wrong) == (True, False)


def test_a_lenient_promise_takes_any_refusal_but_no_success() -> None:
    lenient = Promise([(3,), (0,)], lenient=True)
    assert judge(lenient, [1, 0], ["Traceback (most recent call last):", ""], losses=[], differences=[]).survived
    assert not judge(lenient, [0, 0], ["", ""], losses=[], differences=[]).survived


class Scripted:
    """Starts small scripts in place of the judged programs."""

    def __init__(self, *scripts: str) -> None:
        self.scripts = list(scripts)

    def start(self, words: list[str], log: Path, **options: Any) -> Process:
        log.with_suffix(".err").write_text("")
        command = [sys.executable, "-S", "-c", self.scripts.pop(0)]
        pid = os.posix_spawn(sys.executable, command, os.environ)
        return Process(pid, log.with_suffix(".err"))


WRITE = """
import json, os, time
def lines(first, last): return "".join(json.dumps({{"step": n}}) + "\\n" for n in range(first, last + 1))
os.makedirs({run!r}, exist_ok=True)
open({run!r} + "/new", "w").write(lines(0, {first})); os.replace({run!r} + "/new", {run!r} + "/metrics.jsonl")
time.sleep(0.2)
open({run!r} + "/metrics.jsonl", "a").write(lines({first} + 1, {last}))
os._exit({code})
"""


def test_steps_that_were_done_again_are_counted(tmp_path: Path) -> None:
    starts = ((0, 5, 9), (4, 8, 9), (8, 12, 0))
    scripts = [
        WRITE.format(run=str(tmp_path / "run"), first=first, last=last, code=code) for first, last, code in starts
    ]
    nursery: Any = Scripted(*scripts)
    scene = Scene(tmp_path, SFT, nursery, clean=tmp_path)
    for _ in starts:
        scene.end(scene.launch(["train.py"]))
    assert [end.code for end in scene.ends] == [9, 9, 0]
    assert [end.done for end in scene.ends] == [5, 8, 12]
    # Step 5 was done and then done again; the third start went on from the last one done.
    assert scene.losses == [0, 1, 0]


def test_what_a_folder_tells_from_outside(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"step": 3}\n{"step": 4, "train/lo')
    half = run / "checkpoints" / ".tmp-1-step-0000004"
    half.mkdir()
    assert (last_step(run), newest_saved(run), half_written(run)) == (3, 2, [])
    (half / "adapter.safetensors").write_bytes(b"half")
    assert half_written(run) == [half]


def test_one_bit_is_flipped(tmp_path: Path) -> None:
    save_file({"a": torch.ones(8)}, str(tmp_path / "a.safetensors"))
    before = (tmp_path / "a.safetensors").read_bytes()
    flip_bit(tmp_path / "a.safetensors")
    after = (tmp_path / "a.safetensors").read_bytes()
    changed = [(old ^ new) for old, new in zip(before, after, strict=True) if old != new]
    assert len(changed) == 1
    assert bin(changed[0]).count("1") == 1
    values = [value for (value,) in struct.iter_unpack("<f", after[-32:])]
    assert len([value for value in values if value != 1.0]) == 1


def test_at_least_forty_faults_each_with_a_name_and_a_control() -> None:
    faults = [fault for group in GROUPS.values() for fault in group]
    assert len(faults) >= 40
    assert len({fault.name for fault in faults}) == len(faults)
    assert {fault.broken for fault in faults} - {""} <= VARIANTS.keys()
    # A variant that no fault uses would be dead.
    assert VARIANTS.keys() - {fault.broken for fault in faults} <= {"rows_dropped", "metrics_swallowed"}
    with pytest.raises(SystemExit, match="no such fault: kill softly"):
        chosen(catalogue(), ["kill softly"])


def test_the_plain_loop_meets_the_same_stories() -> None:
    plain = {fault.name.removeprefix("plain "): fault for _, fault in plain_faults()}
    assert set(SHARED) <= plain.keys()
    ours = {fault.name: fault for _, fault in catalogue()}
    for name in SHARED:
        assert plain[name].story is ours[name].story, name
    assert all(fault.promise.lenient for fault in plain.values())
