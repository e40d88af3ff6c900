"""Adapter folders: what plain PEFT reads from ours, and what ours refuses of others."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fine_tune import checkpoints
from fine_tune.errors import CheckpointError, UnsafeArtifact
from fine_tune.models.adapter import (
    ADAPTER,
    AdapterSpec,
    attach,
    load_initial_adapter,
    save_adapter_folder,
    scaling,
    trained_state,
)
from fine_tune.models.base import load_base
from fine_tune.models.forward import supervised_logps

from .conftest import base_spec, llama, micro_batch, randomize, train_steps

SPEC = AdapterSpec(trains="adapter", rank=4, alpha=8.0)
BASE = "f" * 64


def trained(seed: int = 1, **changes: object) -> nn.Module:
    network = attach(llama(), replace(SPEC, **changes))  # type: ignore[arg-type]
    randomize(network, seed)
    return network


def scores(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return supervised_logps(network, micro_batch())


def saved(folder: Path, network: nn.Module | None = None) -> Path:
    save_adapter_folder(network or trained(), folder, {"base_fingerprint": BASE, "step": 3})
    return folder


@pytest.mark.parametrize(
    "changes", [{}, {"rank_stabilized": True}, {"use_dora": True}, {"new_tokens": [5, 6]}], ids=str
)
def test_plain_peft_reads_the_folder_and_gives_the_same_logits(
    base_folder: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    network = attach(load_base(base_spec(base_folder)), replace(SPEC, **changes))  # type: ignore[arg-type]
    randomize(network)
    saved(tmp_path / "a", network)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path / "a").eval()
    ids = torch.tensor([[3, 5, 6, 8, 5, 9, 14, 11]])
    with torch.no_grad():
        theirs = plain(input_ids=ids).logits
        network.get_base_model().set_attn_implementation("sdpa")
        ours = network.eval()(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(base_folder)(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (base - theirs).abs().max() > 1e-2
    size = sum(f.stat().st_size for f in (tmp_path / "a").glob("*.safetensors"))
    assert size < 4 * sum(t.numel() for t in trained_state(network).values()) + 8192, "no table was saved along"


def test_the_identity_lies_beside_the_weights(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    weights = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    known = {"base_fingerprint": BASE, "step": 3, "weights_sha256": weights}
    assert json.loads((folder / "fine_tune.json").read_text()) == known
    assert sorted(p.suffix for p in folder.iterdir() if p.name.startswith("adapter")) == [".json", ".safetensors"]


@pytest.mark.parametrize("kind", ["adapter", "checkpoint"])
def test_a_flipped_bit_of_an_adapter_is_found(tmp_path: Path, kind: str) -> None:
    if kind == "adapter":
        file = saved(tmp_path / "a") / "adapter_model.safetensors"
    else:
        record = {"base_fingerprint": BASE, "scaling": scaling(trained())}
        made = checkpoints.save(tmp_path, 1, adapter=trained_state(trained()), trainer={}, record=record)
        file = made.folder / "adapter.safetensors"
    network = trained(seed=2)
    load_initial_adapter(network, file.parent, BASE)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    before = {name: tensor.clone() for name, tensor in trained_state(network).items()}
    with pytest.raises(CheckpointError, match=f"init_from: the content of .*{file.name} is not what was saved"):
        load_initial_adapter(network, file.parent, BASE)
    assert all(torch.equal(before[name], tensor) for name, tensor in trained_state(network).items())


def test_a_fully_trained_model_is_saved_whole(tmp_path: Path) -> None:
    model = attach(llama(), AdapterSpec(trains="all"))
    train_steps(model, 1)
    saved(tmp_path / "m", model)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("changes", [{}, {"new_tokens": [5, 6]}], ids=str)
@pytest.mark.parametrize("kind", ["run", "adapter", "checkpoint"])
def test_a_new_run_starts_from_a_run_an_adapter_or_a_checkpoint(
    tmp_path: Path, kind: str, changes: dict[str, object]
) -> None:
    network, fresh = trained(**changes), trained(2, **changes)
    if kind == "checkpoint":
        state = {"adapter": trained_state(network), "trainer": {}, "record": {"base_fingerprint": BASE}}
        folder = checkpoints.save(tmp_path, 3, **state).folder  # type: ignore[arg-type]
    else:
        folder = saved(tmp_path / "run" / "adapter", network)
        folder = folder.parent if kind == "run" else folder
    assert not torch.equal(scores(fresh), scores(network))
    assert load_initial_adapter(fresh, folder, BASE) is None
    assert torch.equal(scores(fresh), scores(network))


def test_a_foreign_adapter_is_taken_with_one_warning(tmp_path: Path) -> None:
    network = trained()
    network.save_pretrained(str(tmp_path / "a"), save_embedding_layers=False)
    fresh = trained(2)
    warning = load_initial_adapter(fresh, tmp_path / "a", BASE)
    assert warning is not None
    assert warning.startswith(f"init_from={tmp_path / 'a'}: a foreign PEFT adapter with no record of its base")
    assert torch.equal(scores(fresh), scores(network))


@pytest.mark.parametrize("kind", ["adapter", "checkpoint"])
def test_another_base_is_refused_before_anything_is_loaded(tmp_path: Path, kind: str) -> None:
    network, fresh = trained(), trained(2)
    if kind == "adapter":
        folder = saved(tmp_path / "a", network)
    else:
        record = {"base_fingerprint": BASE}
        folder = checkpoints.save(tmp_path, 1, adapter=trained_state(network), trainer={}, record=record).folder
    before = scores(fresh)
    with pytest.raises(CheckpointError, match=r"another base model \(fingerprint f{12}, this base has e{12}\)"):
        load_initial_adapter(fresh, folder, "e" * 64)
    assert torch.equal(scores(fresh), before)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alpha": 9.0}, r"method\.alpha=8\.0 \(it has 9\.0\)"),
        ({"rank_stabilized": True}, r"method\.rank_stabilized=False \(it has True\)"),
        ({"rank": 8}, r"method\.rank=4 \(it has 8\)"),
        ({"use_dora": True}, r"method\.use_dora=False \(it has True\)"),
    ],
)
def test_other_scaling_is_refused_by_name(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    folder = saved(tmp_path / "a", trained(**changes))
    with pytest.raises(CheckpointError, match=words):
        load_initial_adapter(trained(2), folder, BASE)


def test_a_pickle_is_refused_and_not_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(UnsafeArtifact, match=r"adapter_model\.bin is a pickle file\. Convert it to safetensors"):
        load_initial_adapter(trained(2), folder, BASE)


def test_tied_tables_share_their_trained_rows_also_in_plain_peft(tmp_path: Path) -> None:
    base = llama(tied=True)
    base.save_pretrained(str(tmp_path / "base"))
    network = attach(base, replace(SPEC, new_tokens=[5, 6]))
    randomize(network)
    saved(tmp_path / "a", network)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "a").eval()
    ids = torch.tensor([[3, 5, 6, 8]])
    network.get_base_model().set_attn_implementation("sdpa")
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=0, atol=1e-5)
    assert sum(tuple(t.shape) == (2, 32) for t in trained_state(network).values()) == 1


def test_new_tokens_leave_with_the_adapter_and_come_back(base_folder: Path, tmp_path: Path) -> None:
    spec = replace(SPEC, new_tokens=[5, 6])
    network = attach(load_base(base_spec(base_folder)), spec)
    train_steps(network, 2)
    state = trained_state(network)
    rows = {name: t for name, t in state.items() if "token_adapter" in name or "trainable_tokens" in name}
    assert sorted(tuple(t.shape) for t in rows.values()) == [(2, 32), (2, 32)]
    folder = saved(tmp_path / "a", network)
    again = attach(load_base(base_spec(base_folder)), spec)
    assert load_initial_adapter(again, folder, BASE) is None
    assert torch.equal(scores(again), scores(network))
    without = attach(load_base(base_spec(base_folder)), SPEC)
    with pytest.raises(CheckpointError, match="2 of 28 tensors differ"):
        load_initial_adapter(without, folder, BASE)


def test_the_adapter_config_names_no_folder_of_this_machine(base_folder: Path, tmp_path: Path) -> None:
    network = attach(load_base(base_spec(base_folder)), SPEC)
    network.peft_config[ADAPTER].base_model_name_or_path = "owner/name"
    folder = saved(tmp_path / "a", network)
    shutil.move(str(folder), str(tmp_path / "b"))
    text = "".join(f.read_text() for f in (tmp_path / "b").glob("*.json"))
    assert str(tmp_path) not in text
    assert "owner/name" in text
