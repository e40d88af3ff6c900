import json
import subprocess
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from fine_tune import speed
from fine_tune.cli.main import main
from fine_tune.device import DevicePlan
from fine_tune.doctor import checkup, devices, places
from fine_tune.doctor.checkup import check_up
from fine_tune.doctor.finding import Finding
from fine_tune.doctor.screen import as_json, screen


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    return check_up()


def named(found: list[Finding]) -> dict[str, Finding]:
    return {one.name: one for one in found}


def test_everything_is_looked_at_and_healthy_here(findings: list[Finding]) -> None:
    found = named(findings)
    looked_at = {"python", "packages", "requirements", "known-bad versions", "cpu", "a run here", "4 bits, cpu"}
    assert looked_at | {"memory", "disk", "caches", "variables"} <= set(found)
    assert [one.says for one in findings if one.state == "broken"] == []
    if not torch.cuda.is_available():
        assert found["a run here"].values == {
            "precision": "32-true", "attention": "attention by segments of like length", "speeds": ["plain"],
        }  # fmt: skip


def test_it_fits_one_screen(findings: list[Finding]) -> None:
    stream = StringIO()
    Console(file=stream, width=100).print(screen(findings))
    lines = stream.getvalue().splitlines()
    assert 12 <= len(lines) <= 40
    assert max(map(len, lines)) <= 100


def test_what_is_broken_comes_last_and_acts_on_no_terminal() -> None:
    stream = StringIO()
    found = [Finding("a", "broken", "no [bold]\x1b[31m"), Finding("b", "ok", "fine"), Finding("c", "look", "hm")]
    Console(file=stream, width=60).print(screen(found))
    assert [line.split() for line in stream.getvalue().splitlines()] == [
        ["ok", "b", "fine"], ["look", "c", "hm"], ["broken", "a", "no", "[bold]\\x1b[31m"],
    ]  # fmt: skip


def test_machines_read_the_same(findings: list[Finding]) -> None:
    read = json.loads(as_json(findings))
    assert read["healthy"] is True
    assert [one["name"] for one in read["findings"]] == [one.name for one in findings]
    assert json.loads(as_json([Finding("a", "broken", "")]))["healthy"] is False


def test_the_exit_code_says_whether_something_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkup, "check_up", lambda: [Finding("gpu", "look", "old")])
    assert main(["doctor"]) == 0
    monkeypatch.setattr(checkup, "check_up", lambda: [Finding("torch", "broken", "gone"), Finding("gpu", "ok", "")])
    assert main(["doctor", "json=true"]) == 5
    said = capsys.readouterr()
    assert said.err == "doctor: 1 finding(s) are broken: torch.\n"
    assert json.loads(said.out.partition("\n")[2])["healthy"] is False
    assert main(["doctor", "jsn=true"]) == 2
    assert "jsn=true: no setting of doctor. It takes json=true." in capsys.readouterr().err


def test_a_wrong_word_is_told_before_torch_is_imported() -> None:
    code = "import sys; from fine_tune.cli.doctor import main; print(main(['x=1']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "2 False"


def test_a_library_that_cannot_be_imported_is_broken_and_the_rest_is_still_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(name: str) -> Any:
        raise OSError(f"lib{name}.so: cannot open shared object file\nmore")

    monkeypatch.setattr(checkup.importlib, "import_module", fail)
    found = named(check_up())
    assert found["torch"].says == "cannot be imported: OSError: libtorch.so: cannot open shared object file"
    assert found["bitsandbytes"].state == "broken"
    assert "cpu" not in found
    assert found["disk"].state in ("ok", "look")


def test_a_look_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise RuntimeError("CUDA error: unknown")
        yield

    monkeypatch.setattr(devices, "device_findings", fail)
    found = named(check_up())
    assert (found["devices"].state, found["devices"].says) == ("broken", "RuntimeError: CUDA error: unknown")
    assert "caches" in found


@pytest.mark.parametrize("capability", [None, (7, 5), (8, 0), (9, 0)])
def test_the_speeds_are_those_that_runs_choose(
    capability: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cpu" if capability is None else "cuda")
    plan = DevicePlan(device, "cpu" if capability is None else "gpu", "32-true", 1, 0)
    assert devices.speeds_of(plan) == tuple(speed.speeds_for(plan))


def asked(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    from bitsandbytes import functional

    def fail() -> bool:
        raise error

    monkeypatch.setattr(functional, "has_avx512bf16", fail)


@pytest.mark.parametrize("error", [OSError("lib"), ImportError("lib"), RuntimeError("lib"), AttributeError("has")])
def test_a_library_that_cannot_say_leaves_it_open(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    asked(monkeypatch, error)
    assert named(list(devices.device_findings()))["cpu"].values["avx512_bf16"] is None


def test_another_error_of_the_look_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    asked(monkeypatch, ValueError("ours"))
    found = named(check_up())
    assert (found["devices"].state, found["devices"].says) == ("broken", "ValueError: ours")


def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (70_000_000_000, 80_000_000_000))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Big GPU")
    monkeypatch.setattr(
        devices, "four_bit_finding", lambda device, dtype: Finding(f"4 bits, {device.type}", "ok", str(dtype))
    )


def test_a_gpu_is_named_with_what_follows_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch)
    found = named(list(devices.device_findings()))
    assert found["gpu 0"].says.startswith("Big GPU, 70.0 of 80.0 GB free, capability 9.0, CUDA ")
    expected = "Big GPU: trainer.precision bf16-mixed, variable-length flash attention, trainer.speed balanced or lean."
    assert found["a run here"].says == expected
    assert (found["4 bits, cpu"].says, found["4 bits, cuda"].says) == ("torch.float32", "torch.bfloat16")


def test_several_processes_are_told_what_a_run_would_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = named(list(devices.device_findings()))
    assert found["a run here"].state == "look"
    assert found["a run here"].says.startswith("trainer.devices=1: this is process 0 of 2.")


def test_a_driver_without_a_cuda_build_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "DRIVER", tmp_path)
    [gpu] = [one for one in devices.device_findings() if one.name == "gpu"]
    assert (gpu.state, "Install a CUDA build" in gpu.says) == ("look", True)


def test_the_trap_of_some_cpus_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_repacks", lambda: True)
    says = devices._cpu().says
    assert (
        "AVX512-BF16, for which bitsandbytes repacks 4-bit weights and later gradients are wrong: switched off" in says
    )
    monkeypatch.setattr(devices, "_repacks", lambda: False)
    assert "AVX512-BF16" not in devices._cpu().says


def test_sizes_are_those_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one").write_bytes(b"x" * 1000)
    (tmp_path / "two").write_bytes(b"x" * 500)
    assert places.size_of(tmp_path) == (1500, False)
    assert places.size_of(tmp_path / "none") == (0, False)
    monkeypatch.setattr(places, "WALK_SECONDS", -1.0)
    assert places.size_of(tmp_path) == (500, True)


def test_little_disk_and_a_folder_that_cannot_be_written_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places.shutil, "disk_usage", lambda place: SimpleNamespace(free=4_900_000_000))
    assert [one.state for one in places._disks()] == ["look"]
    monkeypatch.setattr(places.shutil, "disk_usage", lambda place: SimpleNamespace(free=5_100_000_000))
    assert [one.state for one in places._disks()] == ["ok"]
    monkeypatch.setattr(places.os, "access", lambda place, mode: place != tmp_path)
    assert next(places._disks()).says == f"runs/ ({tmp_path}) cannot be written. Start elsewhere, or pass run_dir=."
    assert next(places._disks()).state == "broken"


def test_memory_is_what_the_container_may_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("3000000000\n")
    monkeypatch.setattr(places, "MEMORY_LIMIT", limit)
    found = places._memory()
    assert found.state == "look"
    assert found.values["total_gb"] == 3.0
    limit.write_text("max\n")
    assert places._memory().values["total_gb"] > 3.0


def test_the_hubs_cache_is_found_as_its_client_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    for variables in (
        {},
        {"HF_HOME": str(tmp_path)},
        {"HF_HUB_CACHE": str(tmp_path / "x")},
        {"XDG_CACHE_HOME": str(tmp_path)},
    ):
        for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        assert str(places.hub_cache()) == done.stdout.strip()


def test_variables_that_matter_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    [found] = [one for one in places.place_findings() if one.name == "variables"]
    assert "HF_HUB_OFFLINE=1" in found.says
    assert "secret" not in as_json([found])
