"""Faults planted into a merge: each is found, and nothing of it stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fine_tune.errors import CheckpointError
from fine_tune.merging import files, merge, reference, stored, weights
from fine_tune.merging.trained import Trained, Update, read_trained

from .conftest import Merge, write_adapter, write_model

Plant = Callable[[pytest.MonkeyPatch], None]


def wrong_scaling(patch: pytest.MonkeyPatch) -> None:
    def doubled(*args: Any, **options: Any) -> Trained:
        found = read_trained(*args, **options)
        found.scaling *= 1.05
        return found

    patch.setattr(merge, "read_trained", doubled)


def missing_layer(patch: pytest.MonkeyPatch) -> None:
    def fewer(*args: Any, **options: Any) -> Trained:
        found = read_trained(*args, **options)
        found.updates.pop("model.layers.1.mlp.down_proj")
        return found

    patch.setattr(merge, "read_trained", fewer)


def swapped_magnitude(patch: pytest.MonkeyPatch) -> None:
    def plain(weight: Tensor, update: Update, scaling: float) -> Tensor:
        assert update.a is not None
        assert update.b is not None
        return weight + scaling * update.b @ update.a

    patch.setattr(weights, "updated", plain)


def other_grid(patch: pytest.MonkeyPatch) -> None:
    """Quantised in blocks of another size than loading takes."""
    read_back = stored._read_back
    patch.setattr(stored, "_read_back", lambda w, settings: read_back(w, {**settings, "blocksize": 128}))


def unquantised(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(stored, "_read_back", lambda weight, settings: weight)


def stale_config(patch: pytest.MonkeyPatch) -> None:
    """A config that says something else than the weights: only the reload can tell."""
    write = files.write_config

    def changed(folder: Path, *args: Any, **options: Any) -> None:
        write(folder, *args, **options)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["rms_norm_eps"] = 0.05
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")

    patch.setattr(files, "write_config", changed)


FAULTS: dict[str, tuple[Plant, list[str]]] = {
    "wrong scaling": (wrong_scaling, []),
    "missing layer": (missing_layer, []),
    "no magnitude": (swapped_magnitude, ["method.use_dora=true"]),
    "another block size": (other_grid, []),
    "not quantised": (unquantised, []),
}


# The logits are the same check whatever is wrong: most faults are a drill there.
BY_LOGITS_TOO = ("wrong scaling", "no magnitude")


@pytest.mark.parametrize(
    ("by", "fault"),
    [
        pytest.param(by, fault, marks=pytest.mark.drill if by == "logits" and fault not in BY_LOGITS_TOO else ())
        for by in ("weights", "logits")
        for fault in FAULTS
    ],
)
def test_a_planted_fault_stops_the_merge(
    fault: str, by: str, tmp_path: Path, merge_into: Merge, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, words = FAULTS[fault]
    model = write_model(tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter", model, *words)
    plant(monkeypatch)
    if by == "logits":
        # Each of the two checks finds it alone.
        monkeypatch.setattr(reference, "compare_weights", lambda *args: None)
    pattern = (
        "away from what base and adapter amount to"
        if by == "weights"
        else r"reloaded, its logits are up to \S+ away from what they must be"
    )
    with pytest.raises(CheckpointError, match=pattern) as refused:
        merge_into(adapter, model, *words)
    assert refused.value.exit_code == 4
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".tmp-*"))
    report = json.loads((tmp_path / "merged.merge_report.json").read_text(encoding="utf-8"))
    assert report["within_tolerance"] is False
    assert report["problem"] in str(refused.value)


def test_a_config_that_lies_about_sound_weights_is_found_by_reloading(
    tmp_path: Path, merge_into: Merge, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter", model)
    stale_config(monkeypatch)
    with pytest.raises(CheckpointError, match="reloaded, its logits are up to"):
        merge_into(adapter, model)
    assert not (tmp_path / "merged").exists()


def test_a_tensor_too_few_in_the_folder_is_found_by_reloading(
    tmp_path: Path, merge_into: Merge, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter", model)
    slots = weights.Weights.slots
    monkeypatch.setattr(
        weights.Weights, "slots", lambda self: [s for s in slots(self) if s.name != "model.norm.weight"]
    )
    with pytest.raises(CheckpointError, match=r"tensors without a place after reloading: model\.norm\.weight"):
        merge_into(adapter, model)
    assert not (tmp_path / "merged").exists()


def test_the_tolerance_is_the_users(tmp_path: Path, merge_into: Merge) -> None:
    model = write_model(tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter", model)
    with pytest.raises(CheckpointError, match="tolerance=1e-12"):
        merge_into(adapter, model, tolerance=1e-12)
    assert (tmp_path / "merged.merge_report.json").is_file()
    assert torch.isfinite(torch.tensor(merge_into(adapter, model, tolerance=1e-3)["against_base_and_adapter"]["kl"]))
    assert not (tmp_path / "merged.merge_report.json").exists(), "the figures of the refused merge are gone"
