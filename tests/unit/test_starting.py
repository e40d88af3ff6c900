"""Where a run's adapter and its reference come from, fresh and resumed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fine_tune import checkpoints, starting
from fine_tune.errors import CheckpointError
from fine_tune.models.adapter import AdapterSpec, adapter_off, attach, save_adapter_folder, trained_state
from fine_tune.models.forward import supervised_logps
from fine_tune.modules.reference import FrozenAdapter, fingerprint, snapshot
from fine_tune.starting import REFERENCE_FILE, start

from .models.conftest import llama, micro_batch, randomize

BASE = "f" * 64
FRESH, SFT, OTHER, LATER = None, 1, 2, 3


@pytest.fixture(autouse=True)
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(starting, "say", said.append)
    return said


def network(seed: int | None = FRESH) -> nn.Module:
    """An adapter as the seed makes it, or one that was trained."""
    model = llama()
    torch.manual_seed(11)
    found = attach(model, AdapterSpec(trains="adapter", rank=4, alpha=8.0))
    if seed is not None:
        randomize(found, seed)
    return found


def adapter(folder: Path, seed: int, base: str = BASE) -> str:
    save_adapter_folder(network(seed), folder, {"base_fingerprint": base})
    return str(folder)


def scores(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return supervised_logps(model, micro_batch())


def config(reference: str | None = None, init_from: str | None = None) -> dict[str, Any]:
    return {"init_from": init_from, "objective": {"name": "dpo"} | ({"reference": reference} if reference else {})}


def record(**more: str) -> dict[str, Any]:
    return {"base_fingerprint": BASE, "data_fingerprint": "d1", "scaling": {"r": 4}} | more


def begin(
    cfg: dict[str, Any],
    folder: Path,
    *,
    checkpoint: checkpoints.Checkpoint | None = None,
    notes: dict[str, Any] | None = None,
) -> tuple[nn.Module, FrozenAdapter | None]:
    model = network()
    return model, start(cfg, model, record() if notes is None else notes, folder=folder, checkpoint=checkpoint)


def check(model: nn.Module, reference: FrozenAdapter | None, *, policy: int | None, frozen: int | None) -> None:
    """Both score bit for bit as the adapters they should be, which differ from each other."""
    assert reference is not None
    assert torch.equal(scores(model), scores(network(policy)))
    with reference.handed():
        assert torch.equal(scores(model), scores(network(frozen)))
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "lora" in name)


def test_four_adapters_score_differently() -> None:
    """The control of every equality here."""
    found = torch.stack([scores(network(seed)) for seed in (FRESH, SFT, OTHER, LATER)])
    assert torch.pdist(found).min() > 0.1


def test_an_objective_without_a_reference_has_none(tmp_path: Path) -> None:
    notes = record()
    model, reference = begin(config(None, adapter(tmp_path / "sft", SFT)), tmp_path / "run", notes=notes)
    assert reference is None
    assert torch.equal(scores(model), scores(network(SFT)))
    assert notes == record()
    assert not (tmp_path / "run").exists()


def test_initial_is_the_adapter_that_training_starts_from(tmp_path: Path) -> None:
    notes = record()
    model, reference = begin(config("initial", adapter(tmp_path / "sft", SFT)), tmp_path / "run", notes=notes)
    check(model, reference, policy=SFT, frozen=SFT)
    kept = load_file(str(tmp_path / "run" / REFERENCE_FILE))
    assert notes["reference_fingerprint"] == fingerprint(kept) == fingerprint(snapshot(network(SFT)))


def test_initial_without_an_adapter_is_the_base(tmp_path: Path) -> None:
    model, reference = begin(config("initial"), tmp_path / "run")
    check(model, reference, policy=FRESH, frozen=FRESH)
    with adapter_off(model):
        assert torch.equal(scores(model), scores(network(FRESH))), "a fresh adapter adds nothing"
    assert not (tmp_path / "run").exists(), "the seed makes it again"


def test_base_stays_the_base_when_training_starts_elsewhere(tmp_path: Path) -> None:
    model, reference = begin(config("base", adapter(tmp_path / "sft", SFT)), tmp_path / "run")
    check(model, reference, policy=SFT, frozen=FRESH)


@pytest.mark.parametrize("init", [FRESH, SFT])
def test_a_folder_is_the_adapter_in_it_and_the_policy_starts_where_it_would(tmp_path: Path, init: int | None) -> None:
    init_from = None if init is None else adapter(tmp_path / "sft", init)
    model, reference = begin(config(adapter(tmp_path / "other", OTHER), init_from), tmp_path / "run")
    check(model, reference, policy=init, frozen=OTHER)
    if init is None:
        assert all(torch.equal(tensor, snapshot(network())[name]) for name, tensor in snapshot(model).items())


@pytest.mark.parametrize("role", ["reference", "init_from"])
def test_an_adapter_of_another_base_is_refused_in_either_role(tmp_path: Path, role: str) -> None:
    foreign = adapter(tmp_path / "foreign", OTHER, base="e" * 64)
    cfg = config(foreign) if role == "reference" else config("base", foreign)
    with pytest.raises(CheckpointError, match="it belongs to another base model"):
        begin(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_foreign_adapter_is_named_once_per_role(tmp_path: Path, notes: list[str]) -> None:
    folder = adapter(tmp_path / "peft", SFT)
    (Path(folder) / "fine_tune.json").unlink()
    begin(config("base", folder), tmp_path / "run")
    assert len(notes) == 1
    assert notes[0].startswith(f"note: init_from={folder}: a foreign PEFT adapter with no record of its base")


def stopped(run: Path, cfg: dict[str, Any]) -> checkpoints.Checkpoint:
    """A run that began and was stopped at step 4, its adapter trained further."""
    notes = record()
    begin(cfg, run, notes=notes)
    later = network(LATER)
    run.mkdir(exist_ok=True)
    return checkpoints.save(run / "checkpoints", 4, adapter=trained_state(later), trainer={}, record=notes)


@pytest.mark.parametrize("reference", ["initial", "base", "folder"])
def test_a_resumed_run_needs_nothing_that_it_once_started_from(tmp_path: Path, reference: str) -> None:
    init_from = adapter(tmp_path / "sft", SFT)
    name = adapter(tmp_path / "other", OTHER) if reference == "folder" else reference
    cfg = config(name, init_from)
    checkpoint = stopped(tmp_path / "run", cfg)
    for source in ("sft", "other"):
        shutil.rmtree(tmp_path / source, ignore_errors=True)
    # Another rank than the first has a folder of its own, where nothing is.
    model, frozen = begin(cfg, tmp_path / "scratch", checkpoint=checkpoint)
    check(model, frozen, policy=LATER, frozen={"initial": SFT, "base": FRESH, "folder": OTHER}[reference])


def test_a_source_that_was_trained_on_meanwhile_changes_nothing(tmp_path: Path) -> None:
    cfg = config("initial", adapter(tmp_path / "sft", SFT))
    checkpoint = stopped(tmp_path / "run", cfg)
    shutil.rmtree(tmp_path / "sft")
    adapter(tmp_path / "sft", OTHER)
    model, frozen = begin(cfg, tmp_path / "run", checkpoint=checkpoint)
    check(model, frozen, policy=LATER, frozen=SFT)


def test_a_changed_fingerprint_refuses_to_go_on_and_names_it(tmp_path: Path) -> None:
    cfg = config("initial", adapter(tmp_path / "sft", SFT))
    checkpoint = stopped(tmp_path / "run", cfg)
    changed = record(data_fingerprint="d2") | {"scaling": {"r": 8}}
    with pytest.raises(CheckpointError, match="data_fingerprint changed since it was written") as refused:
        begin(cfg, tmp_path / "run", checkpoint=checkpoint, notes=changed)
    assert f"{checkpoint.folder}: data_fingerprint changed" in str(refused.value), "and nothing else"


def test_a_reference_that_was_changed_in_the_run_refuses_to_go_on(tmp_path: Path) -> None:
    cfg = config("initial", adapter(tmp_path / "sft", SFT))
    checkpoint = stopped(tmp_path / "run", cfg)
    file = tmp_path / "run" / REFERENCE_FILE
    values = load_file(str(file))
    next(iter(values.values())).view(-1)[0] += 1e-3
    save_file(values, str(file))
    with pytest.raises(CheckpointError, match="reference_fingerprint changed since it was written"):
        begin(cfg, tmp_path / "run", checkpoint=checkpoint)


def test_another_named_reference_refuses_to_go_on(tmp_path: Path) -> None:
    sft = adapter(tmp_path / "sft", SFT)
    checkpoint = stopped(tmp_path / "run", config("initial", sft))
    with pytest.raises(CheckpointError, match="reference_fingerprint changed since it was written"):
        begin(config("base", sft), tmp_path / "run", checkpoint=checkpoint)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_kept_reference_that_is_gone_is_named(tmp_path: Path, damage: str) -> None:
    cfg = config("initial", adapter(tmp_path / "sft", SFT))
    checkpoint = stopped(tmp_path / "run", cfg)
    file = tmp_path / "run" / REFERENCE_FILE
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[:100])
    with pytest.raises(CheckpointError, match="the run's reference is missing or damaged") as refused:
        begin(cfg, tmp_path / "run", checkpoint=checkpoint)
    assert str(file) in str(refused.value)
    assert "Start a new run with init_from=." in str(refused.value)
