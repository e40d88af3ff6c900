"""What trainer.speed stands for, and what a device makes of auto."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fine_tune.device import DevicePlan
from fine_tune.models.execution import Execution
from fine_tune.speed import KEYS, SPEEDS, chosen_execution

CPU = DevicePlan(torch.device("cpu"), "cpu", "32-true", 1, 0)
UNSET: dict[str, Any] = {"recompute": None, "offload": None, "compile": None, "fused_lora": None}


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> DevicePlan:
    """A card of the generation that the test names."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: request.param)
    return DevicePlan(torch.device("cuda", 0), "gpu", "bf16-mixed", 1, 0)


def chosen(speed: str, plan: DevicePlan = CPU, **own: Any) -> Execution:
    return chosen_execution(UNSET | {"speed": speed, "max_steps": 3} | own, plan)


@pytest.mark.parametrize(
    ("speed", "expected"),
    [
        ("plain", Execution("none", offload=False, compile=False, fused_lora=False)),
        ("fast", Execution("none", offload=False, compile=True, fused_lora=True)),
        ("balanced", Execution("selective", offload=False, compile=True, fused_lora=True)),
        ("lean", Execution("full", offload=True, compile=True, fused_lora=True)),
    ],
)
@pytest.mark.parametrize("gpu", [(7, 5), (9, 0)], indirect=True, ids=["Turing", "Hopper"])
def test_a_name_stands_for_the_same_on_every_device(gpu: DevicePlan, speed: str, expected: Execution) -> None:
    assert chosen(speed) == chosen(speed, gpu) == expected
    assert expected.is_plain is (speed == "plain")


def test_every_key_is_one_of_the_config() -> None:
    assert set(KEYS) == set(UNSET)
    assert set(SPEEDS) == {"plain", "fast", "balanced", "lean"}


@pytest.mark.parametrize(
    ("speed", "key", "value", "expected"),
    [
        ("plain", "compile", True, Execution(compile=True)),
        ("plain", "fused_lora", True, Execution(fused_lora=True)),
        ("plain", "recompute", "full", Execution("full")),
        ("fast", "recompute", "selective", SPEEDS["balanced"]),
        ("balanced", "compile", False, Execution("selective", fused_lora=True)),
        ("balanced", "fused_lora", False, Execution("selective", compile=True)),
        ("balanced", "recompute", "none", SPEEDS["fast"]),
        ("lean", "offload", False, Execution("full", compile=True, fused_lora=True)),
        ("auto", "compile", True, Execution(compile=True)),
    ],
)
def test_a_key_that_is_set_wins_over_the_name(speed: str, key: str, value: Any, expected: Execution) -> None:
    assert chosen(speed, **{key: value}) == expected
    assert chosen(speed) != expected, "the table is left as it was"


def test_all_keys_together_leave_nothing_of_the_name() -> None:
    own = {"recompute": "full", "offload": False, "compile": False, "fused_lora": True}
    assert {chosen(speed, **own) for speed in SPEEDS} == {Execution("full", fused_lora=True)}


@pytest.mark.parametrize(
    ("gpu", "expected"), [((7, 5), "plain"), ((8, 0), "balanced"), ((9, 0), "balanced")], indirect=["gpu"]
)
def test_auto_on_a_gpu_asks_for_ampere(gpu: DevicePlan, expected: str) -> None:
    assert chosen("auto", gpu) == SPEEDS[expected]


def test_auto_on_a_cpu_is_plain() -> None:
    assert chosen("auto") == Execution()
