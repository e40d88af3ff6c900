"""What `auto` becomes on a device: LLaMA-2-7B's shape from its config, memory as the test says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig

from fine_tune import memory_plan
from fine_tune.config import check_config
from fine_tune.device import DevicePlan
from fine_tune.memory_plan import DEFAULT_TOKENS, MemoryPlan, Samples, free_memory, plan_memory
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

    def of(size: float, *, capability: tuple[int, int] = (9, 0)) -> DevicePlan:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(memory_plan, "free_memory", lambda plan: int(size * 1e9))
        return DevicePlan(torch.device("cuda", 0), "gpu", "bf16-mixed", 1, 0)

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
    found = plan_memory(config("trainer.precision=16-mixed"), card(16, capability=(7, 5)), folder, ROWS)
    assert found.speed == "plain"
    assert 1024 <= found.tokens < 2048


def test_a_cpu_takes_what_it_always_took(folder: Path) -> None:
    assert plan_memory(config(), CPU, folder, ROWS) == MemoryPlan("plain", SPEEDS["plain"], DEFAULT_TOKENS)
    assert plan_memory(config(), CPU, folder, Samples(5000, 9000)).tokens == 5000
    assert plan_memory(config(), CPU, folder, ROWS).describe() == []


def test_a_model_without_an_estimate_takes_the_usual(card: Callable[..., DevicePlan], tmp_path: Path) -> None:
    small = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    MixtralConfig(**small, num_local_experts=4).save_pretrained(tmp_path)
    found = plan_memory(config(), card(84.5), tmp_path, ROWS)
    assert (found.speed, found.tokens, found.footprint) == ("balanced", DEFAULT_TOKENS, None)


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
