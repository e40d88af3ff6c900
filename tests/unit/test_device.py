"""Device, precision and ranks, settled before a weight is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from fine_tune import device
from fine_tune.device import DevicePlan, leave_room, memory_limit, plan_device
from fine_tune.errors import ConfigError, EnvironmentProblem
from fine_tune.kernels import capability
from fine_tune.speed import speeds_for


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    yield
    capability.use_at_most(None)


@pytest.fixture
def gpu_of(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Pretend that there is a GPU of the given compute capability."""

    def pretend(capability: tuple[int, int]) -> list[torch.device]:
        chosen: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        return chosen

    return pretend


def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def plan(**changes: object) -> DevicePlan:
    asked = {"accelerator": "auto", "devices": 1, "num_nodes": 1, "precision": "auto", **changes}
    return plan_device(**asked)  # type: ignore[arg-type]


def test_without_a_gpu_auto_is_the_cpu_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch)
    found = plan()
    assert found == DevicePlan(torch.device("cpu"), "cpu", "32-true", 1, 0)
    assert found.compute_dtype == torch.float32
    assert found.describe() == f"CPU, {torch.get_num_threads()} threads"


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch)
    with pytest.raises(EnvironmentProblem, match=r"trainer\.accelerator=gpu: torch sees no GPU here\. Use trainer=cpu"):
        plan(accelerator="gpu")


@pytest.mark.parametrize(
    ("capability", "precision", "dtype"),
    [
        ((7, 5), "16-mixed", torch.float16),
        ((8, 0), "bf16-mixed", torch.bfloat16),
        ((9, 0), "bf16-mixed", torch.bfloat16),
    ],
)
def test_auto_takes_the_best_half_precision_of_the_gpu(gpu_of, capability, precision, dtype) -> None:  # type: ignore[no-untyped-def]
    chosen = gpu_of(capability)
    found = plan()
    assert (found.accelerator, found.precision, found.compute_dtype) == ("gpu", precision, dtype)
    assert chosen == [torch.device("cuda", 0)]
    assert found.describe() == "Tesla T4"


def test_the_cpu_can_be_asked_for_where_there_is_a_gpu(gpu_of) -> None:  # type: ignore[no-untyped-def]
    chosen = gpu_of((9, 0))
    assert plan(accelerator="cpu").device == torch.device("cpu")
    assert plan(accelerator="cpu").precision == "32-true"
    assert chosen == []


def test_an_explicit_precision_is_kept(gpu_of) -> None:  # type: ignore[no-untyped-def]
    gpu_of((9, 0))
    assert [plan(precision=p).precision for p in device.COMPUTE] == list(device.COMPUTE)


def test_precision_that_the_device_lacks_is_refused_by_name(gpu_of) -> None:  # type: ignore[no-untyped-def]
    gpu_of((7, 5))
    with pytest.raises(
        EnvironmentProblem, match=r"precision=bf16-mixed: Tesla T4 has no bf16\. Use trainer\.precision=16-mixed"
    ):
        plan(precision="bf16-mixed")
    with pytest.raises(ConfigError, match="precision=16-mixed: CPUs have no fp16 training"):
        plan(accelerator="cpu", precision="16-mixed")
    assert plan(accelerator="cpu", precision="bf16-mixed").compute_dtype == torch.bfloat16


def test_a_process_finds_its_place_in_the_environment(gpu_of, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    chosen = gpu_of((9, 0))
    for key, value in (("RANK", "5"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(key, value)
    found = plan(devices=4, num_nodes=2)
    assert (found.rank, found.num_ranks, found.device) == (5, 8, torch.device("cuda", 1))
    assert chosen == [torch.device("cuda", 1)]
    assert found.describe() == "8 x Tesla T4"


def test_a_launch_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch)
    with pytest.raises(
        ConfigError, match=r"trainer\.devices=2: this is process 0 of 1\..*torchrun --nproc-per-node 2 train\.py"
    ):
        plan(devices=2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"trainer\.devices=1: this is process 0 of 4"):
        plan()


@pytest.fixture
def memory_of(gpu_of, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Pretend that there is a GPU of 80 GB, and note which share of it a process may take."""
    gpu_of((9, 0))
    shares: list[float] = [1.0]
    monkeypatch.setattr(device, "_LIMITED", set())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 10**9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: shares.append(share))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: shares[-1])
    return shares


def test_a_memory_limit_is_the_allocators(memory_of: list[float]) -> None:
    found = plan(memory_limit_gb=15)
    assert found.limit == 15 * 10**9
    assert memory_of == [1.0, 15 / 80]
    assert memory_limit(found.device) == 15 * 10**9
    leave_room(found.device, 3 * 10**9)
    assert memory_limit(found.device) == 12 * 10**9
    leave_room(found.device, 0)
    assert len(memory_of) == 3, "nothing elsewhere leaves the limit alone"


def test_a_limit_ends_with_its_run(memory_of: list[float]) -> None:
    plan(memory_limit_gb=15)
    found = plan()
    assert found.limit is None
    assert memory_of[-1] == 1.0
    assert memory_limit(found.device) is None
    leave_room(found.device, 3 * 10**9)
    assert memory_of[-1] == 1.0, "where there is no limit there is nothing to lower"


def test_without_a_limit_the_allocator_is_left_alone(memory_of: list[float]) -> None:
    plan()
    assert memory_of == [1.0]


def test_a_limit_above_the_card_is_the_card(memory_of: list[float]) -> None:
    assert memory_limit(plan(memory_limit_gb=96).device) is None
    assert memory_of[-1] == 1.0


def test_a_memory_limit_is_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch)
    with pytest.raises(ConfigError, match=r"trainer\.memory_limit_gb=15: is for a GPU.*Pass trainer\.memory_limit_gb=null"):
        plan(memory_limit_gb=15.0)


def test_a_newer_card_can_be_used_as_an_older_one(gpu_of) -> None:  # type: ignore[no-untyped-def]
    gpu_of((9, 0))
    found = plan(capability="sm75")
    assert (found.precision, found.is_ampere, speeds_for(found)) == ("16-mixed", False, ("plain",))
    assert found.describe() == "Tesla T4 used as sm75"
    with pytest.raises(EnvironmentProblem, match=r"bf16-mixed: trainer\.capability=sm75 has no bf16"):
        plan(capability="sm75", precision="bf16-mixed")
    again = plan()
    assert (again.precision, again.is_ampere, again.describe()) == ("bf16-mixed", True, "Tesla T4"), "the next run is not"


def test_an_older_card_is_used_without_flash_attention_and_torch_gets_its_switches_back(gpu_of) -> None:  # type: ignore[no-untyped-def]
    gpu_of((9, 0))
    switches = torch.backends.cuda
    assert switches.flash_sdp_enabled()
    plan(capability="sm75")
    assert not switches.flash_sdp_enabled()
    assert not switches.cudnn_sdp_enabled()
    assert switches.mem_efficient_sdp_enabled()
    plan()
    assert switches.flash_sdp_enabled()
    switches.enable_flash_sdp(False)
    try:
        plan()
        assert not switches.flash_sdp_enabled(), "what somebody else has switched off stays off"
    finally:
        switches.enable_flash_sdp(True)
