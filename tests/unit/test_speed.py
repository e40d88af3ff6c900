"""What trainer.speed stands for, and what a device can run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fine_tune.device import DevicePlan
from fine_tune.models.execution import Execution
from fine_tune.speed import KEYS, SPEEDS, chosen_execution, speeds_for

UNSET: dict[str, Any] = dict.fromkeys(("recompute", "offload", "compile", "fused_lora", "dense_base"))


def chosen(speed: str, **own: Any) -> Execution:
    return chosen_execution(UNSET | {"speed": speed, "max_steps": 3} | own)


@pytest.mark.parametrize(
    ("speed", "expected"),
    [
        ("plain", Execution("none", offload=False, compile=False, fused_lora=False)),
        ("fast", Execution("none", offload=False, compile=True, fused_lora=True)),
        ("balanced", Execution("selective", offload=False, compile=True, fused_lora=True)),
        ("lean", Execution("full", offload=True, compile=True, fused_lora=True)),
    ],
)
def test_what_a_name_stands_for(speed: str, expected: Execution) -> None:
    assert chosen(speed) == expected
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
        ("plain", "dense_base", True, Execution(dense_base=True)),
        ("fast", "recompute", "selective", SPEEDS["balanced"]),
        ("balanced", "compile", False, Execution("selective", fused_lora=True)),
        ("balanced", "fused_lora", False, Execution("selective", compile=True)),
        ("balanced", "recompute", "none", SPEEDS["fast"]),
        ("lean", "offload", False, Execution("full", compile=True, fused_lora=True)),
    ],
)
def test_a_key_that_is_set_wins_over_the_name(speed: str, key: str, value: Any, expected: Execution) -> None:
    assert chosen(speed, **{key: value}) == expected
    assert chosen(speed) != expected, "the table is left as it was"


def test_all_keys_together_leave_nothing_of_the_name() -> None:
    own = {"recompute": "full", "offload": False, "compile": False, "fused_lora": True, "dense_base": False}
    assert {chosen(speed, **own) for speed in SPEEDS} == {Execution("full", fused_lora=True)}


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), ("plain",)), ((8, 0), ("balanced", "lean")), ((9, 0), ("balanced", "lean"))]
)
def test_what_auto_may_choose_asks_for_ampere(
    capability: tuple[int, int], expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert speeds_for(DevicePlan(torch.device("cuda", 0), "gpu", "bf16-mixed", 1, 0)) == expected


def test_auto_on_a_cpu_is_plain() -> None:
    assert speeds_for(DevicePlan(torch.device("cpu"), "cpu", "32-true", 1, 0)) == ("plain",)
