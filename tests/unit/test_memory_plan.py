"""What `auto` becomes on a device: LLaMA-2-7B's shape from its config, memory as the test says."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig

from fine_tune import memory_plan, planning
from fine_tune.config import check_config
from fine_tune.device import DevicePlan
from fine_tune.kernels.capability import use_at_most
from fine_tune.memory.shape import read_shape
from fine_tune.memory_plan import DEFAULT_TOKENS, Estimator, MemoryPlan, Samples, free_memory, plan_memory
from fine_tune.models.execution import Execution
from fine_tune.speed import SPEEDS

CPU = DevicePlan(torch.device("cpu"), "cpu", "32-true", 1, 0)
ROWS = Samples(longest=1024, per_step=40_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("llama")
    LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32).save_pretrained(found)
    return found


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[..., DevicePlan]:
    """A card of so many GB."""

    def of(size: float, *, capability: tuple[int, int] = (9, 0), precision: str = "bf16-mixed") -> DevicePlan:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(memory_plan, "free_memory", lambda plan: int(size * 1e9))
        return DevicePlan(torch.device("cuda", 0), "gpu", precision, 1, 0)

    return of


def config(*words: str) -> dict[str, Any]:
    base = ["model=llama2_7b", "method=qlora", "data=chat", "data.path=rows.jsonl", "data.max_seq_len=1024", "method.rank=64"]
    return dict(check_config([*base, *words]).cfg)


@pytest.fixture(scope="module", autouse=True)
def rows(tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("rows")
    (place / "rows.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        # A model of that size takes half a second to lay out.
        patch.setattr(memory_plan, "read_shape", functools.cache(read_shape))
        yield


def test_auto_is_the_default() -> None:
    assert (config()["trainer"]["speed"], config()["trainer"]["micro_batch_tokens"]) == ("auto", "auto")


@pytest.mark.parametrize(
    ("size", "speed", "tokens"),
    [(84.5, "balanced", 8192), (40, "balanced", 8192), (24, "balanced", 4864), (12, "lean", 8192), (7.7, "lean", 2560)],
)
def test_the_card_decides(folder: Path, card: Callable[..., DevicePlan], size: float, speed: str, tokens: int) -> None:
    found = plan_memory(config(), card(size), folder, ROWS)
    assert (found.speed, found.tokens, found.fits) == (speed, tokens, True)
    assert found.execution == SPEEDS[speed]
    assert found.footprint is not None
    assert found.footprint.total <= 0.92 * size * 1e9
    assert f"trainer.speed={speed}, {tokens:,} tokens" in found.describe()[0]


def test_what_cannot_fit_runs_as_lean_as_it_can_and_says_so(folder: Path, card: Callable[..., DevicePlan]) -> None:
    found = plan_memory(config(), card(6), folder, ROWS)
    assert (found.speed, found.tokens, found.fits) == ("lean", 1024, False)
    assert "may not fit" in found.describe()[1]


def test_what_is_set_stays(folder: Path, card: Callable[..., DevicePlan]) -> None:
    plan = card(84.5)
    found = plan_memory(config("trainer.speed=fast", "trainer.micro_batch_tokens=5000"), plan, folder, ROWS)
    assert (found.speed, found.tokens) == ("fast", 5000)
    assert plan_memory(config("trainer.micro_batch_tokens=20000"), card(40), folder, ROWS).speed == "lean"
    own = plan_memory(config("trainer.dense_base=true"), plan, folder, ROWS)
    assert own.execution.dense_base
    assert own.footprint is not None
    assert own.footprint.base == pytest.approx(13.48e9, rel=0.01)


@pytest.mark.parametrize(
    ("words", "trained"),
    [
        ([], 159_907_840 * 16),
        (["method.rank=16"], 159_907_840 * 4),
        (["method.target_modules=[q_proj,v_proj]"], 33_554_432 * 16),
        (["optim=paged_adamw_32bit"], 159_907_840 * 8),
        (["optim=paged_adamw_8bit"], 159_907_840 * 8),
    ],
)
def test_what_trains_is_read_from_the_config(
    folder: Path, card: Callable[..., DevicePlan], words: list[str], trained: int
) -> None:
    found = plan_memory(config(*words), card(84.5), folder, ROWS)
    assert found.footprint is not None
    assert found.footprint.trained == trained


def test_a_live_reference_from_an_adapter_is_a_copy_of_it(folder: Path, card: Callable[..., DevicePlan]) -> None:
    words = ["objective=dpo", "data=preferences", "data.path=rows.jsonl"]
    sizes = []
    for cfg in (config(*words), config(*words) | {"init_from": "runs/sft"}):
        found = plan_memory(cfg, card(84.5), folder, ROWS)
        assert found.footprint is not None
        sizes.append(found.footprint.trained)
    assert sizes[1] - sizes[0] == 159_907_840 * 4


def test_an_older_card_runs_plain(folder: Path, card: Callable[..., DevicePlan]) -> None:
    plan = card(16, capability=(7, 5), precision="16-mixed")
    found = plan_memory(config("trainer.precision=16-mixed", "model.dtype=float16"), plan, folder, ROWS)
    assert (found.speed, found.tokens, found.fits) == ("plain", 1024, True)
    recomputed = plan_memory(config("trainer=t4", "model.dtype=float16"), plan, folder, ROWS)
    assert (recomputed.speed, recomputed.tokens, recomputed.fits) == ("plain", 8192, True)
    assert recomputed.execution == Execution("full")


def test_a_paged_optimizers_state_counts_where_there_is_a_limit(folder: Path, card: Callable[..., DevicePlan]) -> None:
    trained = []
    for words in ([], ["trainer.memory_limit_gb=30"], ["trainer.memory_limit_gb=30", "optim=paged_adamw_8bit"]):
        found = plan_memory(config("optim=paged_adamw_32bit", *words), card(84.5), folder, ROWS)
        assert found.footprint is not None
        trained.append(found.footprint.trained // 159_907_840)
    assert trained == [8, 16, 10]


def test_a_limit_is_what_is_left_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gb = 10**9
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * gb, 80 * gb))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 6 * gb)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5 * gb)
    plan = DevicePlan(torch.device("cuda", 0), "gpu", "bf16-mixed", 1, 0)
    assert [free_memory(replace(plan, limit=limit)) // gb for limit in (None, 15 * gb, 100 * gb)] == [71, 10, 71]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=80 * gb))
    several = replace(plan, num_ranks=2, limit=15 * gb)
    assert free_memory(several) == 15 * gb


@pytest.mark.parametrize(
    ("words", "size", "speed", "tokens"),
    [
        (["trainer=t4", "model.dtype=float16"], 80, "plain", 8192),
        (["trainer=t4", "model.dtype=float16", "trainer.recompute=null"], 80, "plain", 1024),
        (["trainer=rtx3060"], 80, "lean", 8192),
        ([], 80, "balanced", 8192),
    ],
)
def test_a_card_that_is_not_here_is_planned_as_the_trainer_says(
    words: list[str], size: int, speed: str, tokens: int, folder: Path
) -> None:
    cfg = config(*words, "trainer.accelerator=gpu")
    device, bytes_of_card = planning._device(cfg, size)
    assert device.absent
    assert bytes_of_card == min(size, cfg["trainer"]["memory_limit_gb"] or size) * 10**9
    found = plan_memory(cfg, device, folder, ROWS, card=bytes_of_card)
    assert (found.speed, found.tokens) == (speed, tokens)
    use_at_most(None)


def test_a_head_that_is_cast_is_planned(folder: Path, card: Callable[..., DevicePlan]) -> None:
    plan, words = card(84.5, precision="16-mixed"), ["trainer.precision=16-mixed"]
    for dtype, casts in (("bfloat16", True), ("float16", False)):
        assert Estimator.of(config(*words, f"model.dtype={dtype}"), read_shape(folder), plan).casts_head is casts
    assert Estimator.of(config(), read_shape(folder), card(84.5)).copies_heads is False
    assert Estimator.of(config(), read_shape(folder), card(84.5, precision="32-true")).copies_heads is True


def test_a_cpu_takes_what_it_always_took(folder: Path) -> None:
    assert plan_memory(config(), CPU, folder, ROWS) == MemoryPlan("plain", SPEEDS["plain"], DEFAULT_TOKENS)
    assert plan_memory(config(), CPU, folder, Samples(5000, 9000)).tokens == 5000
    assert plan_memory(config(), CPU, folder, ROWS).describe() == []


def test_a_model_without_an_estimate_takes_the_usual(card: Callable[..., DevicePlan], tmp_path: Path) -> None:
    small = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    MixtralConfig(**small, num_local_experts=4).save_pretrained(tmp_path)
    found = plan_memory(config(), card(84.5), tmp_path, ROWS)
    assert (found.speed, found.tokens, found.footprint) == ("balanced", DEFAULT_TOKENS, None)
    assert found.fits
    [line] = found.describe()
    assert line.startswith("memory: no estimate for this model (")
    assert line.endswith("): trainer.speed=balanced, 4,096 tokens per forward")
    assert found.unknown is not None
    assert found.unknown in line
    # On a CPU nothing is estimated for any model, so nothing is missing.
    assert plan_memory(config(), CPU, tmp_path, ROWS).describe() == []


def test_what_was_settled_is_what_a_resumed_run_reads(folder: Path, card: Callable[..., DevicePlan]) -> None:
    cfg = config()
    settled = plan_memory(cfg, card(24), folder, ROWS).settled(cfg["trainer"])
    assert settled == {**cfg["trainer"], "speed": "balanced", "micro_batch_tokens": 4864}
    again = plan_memory({**cfg, "trainer": settled}, card(84.5), folder, ROWS)
    assert (again.speed, again.tokens) == ("balanced", 4864), "on a larger card, too"


def test_several_processes_choose_by_the_smallest_card(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        def __init__(self, total: int) -> None:
            self.total_memory = total

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Card([80, 24][i]))
    plans = [DevicePlan(torch.device("cuda", rank), "gpu", "bf16-mixed", 2, rank) for rank in (0, 1)]
    assert [free_memory(plan) for plan in plans] == [24, 24]


def test_samples_are_counted_for_one_device() -> None:
    assert Samples.of([100, 300], global_batch_size=8, num_ranks=2) == Samples(300, 801)
    assert Samples.of([], global_batch_size=8, num_ranks=1).longest == 1
