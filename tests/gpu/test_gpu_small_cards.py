"""A newer card used as a T4, and a limit of memory that holds: what presets of small cards promise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fine_tune
from fine_tune.device import plan_device
from fine_tune.errors import MemoryExhausted
from fine_tune.models import attention
from tests.integration.conftest import read_metrics, small_job, stand_in  # noqa: F401 - a fixture
from tests.reference.older_card import NewerOperation, OlderCard

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]
T4 = ["trainer=t4", "model.dtype=float16", "trainer.num_workers=0"]


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    plan_device(accelerator="gpu", devices=1, num_nodes=1, precision="auto")


def job(stand_in: tuple[Path, Path], folder: Path, *words: str) -> list[str]:  # noqa: F811
    return [word for word in small_job(stand_in, folder) if word != "trainer=cpu"] + list(words)


def test_a_run_as_on_a_t4_has_nothing_that_is_newer(stand_in: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    words = job(stand_in, tmp_path / "run", *T4, "method=qlora", "trainer.max_steps=30", "optim.global_batch_size=16")
    with OlderCard() as audit:
        summary = fine_tune.train(words)
    assert audit.dtypes <= {torch.float16, torch.float32, torch.float64}
    assert not any(name.startswith("fine_tune") for name in audit.seen)
    assert sum(count for name, count in audit.seen.items() if "_efficient_attention" in name) > 0
    assert (summary["precision"], summary["memory_limit_gb"], summary["host_paged_gb"]) == ("16-mixed", 15.0, 0.0)
    assert summary["device"].endswith("used as sm75")
    losses = [line["train/loss"] for line in read_metrics(tmp_path / "run") if "train/loss" in line]
    assert sum(losses[-5:]) / 5 < losses[0] - 0.1, losses


def test_the_audit_would_see_what_a_newer_card_does(stand_in: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    words = job(stand_in, tmp_path / "run", "trainer=gpu", "trainer.speed=plain", "trainer.num_workers=0", "method=qlora")
    with OlderCard(), pytest.raises(NewerOperation):
        fine_tune.train([*words, "model.dtype=bfloat16"])


@pytest.mark.parametrize("heads", [8, 2])
def test_attention_as_on_a_t4_keeps_no_squares(heads: int) -> None:
    plan_device(accelerator="gpu", devices=1, num_nodes=1, precision="auto", capability="sm75")
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, n, 4096, 64, device="cuda", generator=generator, dtype=torch.float16, requires_grad=True)
        for n in (8, heads, heads)
    )
    segments = attention.Segments.of([4096]).to("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with OlderCard():
        found, _ = attention.packed_attention(torch.nn.Identity(), q, k, v, None, segments=segments)
        found.float().sum().backward()
    # One square of all heads in half precision is 268 MB.
    assert torch.cuda.max_memory_allocated() - before < 150e6
    exact = F.scaled_dot_product_attention(*(x.detach().double() for x in (q, k, v)), is_causal=True, enable_gqa=True)
    assert (found.detach()[0].transpose(0, 1) - exact[0]).abs().max() < 5e-3


def test_a_limit_ends_a_run_that_needs_more(stand_in: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    words = job(stand_in, tmp_path / "run", "trainer=gpu", "trainer.speed=plain", "trainer.memory_limit_gb=0.01")
    with pytest.raises(MemoryExhausted) as stopped:
        fine_tune.train(words)
    assert stopped.value.exit_code == 7


def test_a_limit_is_the_allocators_and_ends_with_its_run() -> None:
    plan = plan_device(accelerator="gpu", devices=1, num_nodes=1, precision="auto", memory_limit_gb=1.0)
    torch.cuda.empty_cache()
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1_100_000_000, dtype=torch.uint8, device=plan.device)
    plan_device(accelerator="gpu", devices=1, num_nodes=1, precision="auto")
    assert torch.empty(1_100_000_000, dtype=torch.uint8, device=plan.device).is_cuda


def test_paged_state_is_counted(stand_in: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    words = job(stand_in, tmp_path / "run", "trainer=gpu", "trainer.speed=plain", "optim=paged_adamw_32bit")
    # Only weights of 100,000 values and more go into pages.
    summary = fine_tune.train([*words, "trainer.memory_limit_gb=4", "method.rank=1024", "method.alpha=1024", "trainer.max_steps=3"])
    assert summary["host_paged_gb"] > 0
    assert summary["memory_limit_gb"] == 4.0
