"""Every kind of model and adapter, merged and read back: the folder says what base and adapter say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fine_tune.errors import CheckpointError, ConfigError, StorageError
from fine_tune.merging import resources

from .conftest import Merge, write_adapter, write_model

NO_BITS = ["method=lora"]
KINDS: dict[str, tuple[str, list[str]]] = {
    "nf4": ("untied", []),
    "nf4, single quantisation": ("untied", ["method.double_quant=false"]),
    "fp4": ("untied", ["method.quant_type=fp4"]),
    "bf16 storage": ("untied", ["model.dtype=bfloat16"]),
    "some layers": ("untied", ["method.target_modules=[q_proj,down_proj]"]),
    "rank stabilised": ("untied", ["method.rank_stabilized=true"]),
    "dora on nf4": ("untied", ["method.use_dora=true"]),
    "tied": ("tied", []),
    "tied, new tokens": ("tied", ["model.add_tokens=['<a>','<b>']"]),
    "untied, new tokens in spare rows": ("untied", ["model.add_tokens=['<a>']"]),
    "untied, new tokens beyond the table": ("untied", [f"model.add_tokens={[f'<{i}>' for i in range(12)]}"]),
    "head with a bias": ("phi", []),
    "head with a bias, new tokens": ("phi", [f"model.add_tokens={[f'<{i}>' for i in range(12)]}"]),
    "no quantisation": ("untied", NO_BITS),
    "dora, no quantisation": ("tied", ["method=dora"]),
    "adapter on a tied head": ("tied", [*NO_BITS, "method.target_modules=[q_proj,lm_head]"]),
}
# What another kind has, and more beside it.
HELD_BY_OTHERS = ("nf4, single quantisation", "some layers", "tied", "head with a bias", "untied, new tokens in spare rows")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.drill if kind in HELD_BY_OTHERS else ()) for kind in KINDS]
)
def test_the_folder_says_what_base_and_adapter_say(kind: str, tmp_path: Path, merge_into: Merge) -> None:
    model_kind, words = KINDS[kind]
    model = write_model(tmp_path / "model", model_kind)
    adapter = write_adapter(tmp_path / "adapter", model, *words)
    report = merge_into(adapter, model, *words)
    own = report["against_base_and_adapter"]
    assert report["within_tolerance"]
    assert report["tolerance"] == 1e-4
    assert own["max_logit_gap"] <= 1e-4
    assert own["greedy_equal"]
    assert report["num_prompts"] == 3
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert report["num_tensors_compared"] == len(stored)
    # The adapter is in it: its random weights are far from nothing.
    name = next(name for name in stored if name.endswith("q_proj.weight"))
    moved = (stored[name] - load_file(model / "model.safetensors")[name]).abs().max()
    assert moved > 0.1
    config = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == stored[next(n for n in stored if "embed" in n)].shape[0]
    assert config["tie_word_embeddings"] == (model_kind == "tied" and kind != "adapter on a tied head")
    assert "quantization_config" not in config


def test_eight_bits_are_merged_up_to_the_rounding_of_their_products(tmp_path: Path, merge_into: Merge) -> None:
    model = write_model(tmp_path / "model")
    report = merge_into(write_adapter(tmp_path / "adapter", model, "method=qlora8"), model, "method=qlora8")
    # LLM.int8 rounds activations, too, which a merged model does not: it is held to its own tensors.
    assert (report["base"], report["tolerance"]) == ("int8", 1e-4)
    assert report["reloaded"]["max_logit_gap"] <= 1e-4
    assert report["against_base_and_adapter"]["max_logit_gap"] < report["bases"]["bf16"]["max_logit_gap"] < 0.5


def test_half_precision_is_one_rounding_away(tmp_path: Path, merge_into: Merge) -> None:
    model = write_model(tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter", model)
    gaps = {}
    for dtype in ("float32", "float16", "bfloat16"):
        report = merge_into(adapter, model, dtype=dtype, out=tmp_path / dtype)
        gaps[dtype] = report["against_base_and_adapter"]["max_logit_gap"]
        # However far rounding moves it, the folder says what its tensors say.
        assert report["tolerance"] == 1e-4
        assert report["reloaded"]["max_logit_gap"] <= 1e-4
        assert report["reloaded"]["greedy_equal"]
        (whole,) = {t.dtype for t in load_file(tmp_path / dtype / "model.safetensors").values()}
        assert str(whole) == f"torch.{dtype}"
    assert gaps["float32"] < gaps["float16"] < gaps["bfloat16"] < 0.5
    exact = load_file(tmp_path / "float32" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "bfloat16" / "model.safetensors").items():
        assert torch.equal(tensor, exact[name].bfloat16()), name


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    "kind", ["tied, new tokens", "adapter on a tied head", pytest.param("head with a bias, new tokens", marks=pytest.mark.drill)]
)
def test_rounded_tables_are_held_to_their_own_tensors(kind: str, tmp_path: Path, merge_into: Merge) -> None:
    model_kind, words = KINDS[kind]
    model = write_model(tmp_path / "model", model_kind, dtype=torch.bfloat16)
    # Without dtype= it is that of the base's files.
    report = merge_into(write_adapter(tmp_path / "adapter", model, *words), model, *words, dtype=None)
    assert report["dtype"] == "bfloat16"
    assert report["reloaded"]["max_logit_gap"] <= 1e-4 < report["against_base_and_adapter"]["max_logit_gap"]


def test_the_other_base_is_measured_and_costs_more(tmp_path: Path, merge_into: Merge) -> None:
    model = write_model(tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter", model)
    nf4 = merge_into(adapter, model, out=tmp_path / "nf4")
    original = merge_into(adapter, model, base="bf16", out=tmp_path / "bf16")
    price = nf4["bases"]["bf16"]
    assert nf4["bases"]["nf4"]["max_logit_gap"] <= 1e-4
    assert price["max_logit_gap"] > 0.1
    assert price["kl"] > 0
    # Told before merging and measured after it, it is the same price.
    assert original["bases"]["bf16"]["max_logit_gap"] == pytest.approx(price["max_logit_gap"], rel=0.2)
    assert original["against_base_and_adapter"]["max_logit_gap"] <= 1e-4
    assert original["bases"]["nf4"] == {"reason": "not merged: it is what training stood on"}


def test_the_folder_stands_alone(tmp_path: Path, merge_into: Merge) -> None:
    words = ["model.add_tokens=['<a>']"]
    model = write_model(tmp_path / "model")
    merge_into(write_adapter(tmp_path / "adapter", model, *words), model, *words)
    folder = tmp_path / "merged"
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    assert tokenizer.convert_tokens_to_ids("<a>") == 40
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "w1"}], tokenize=False, add_generation_prompt=True
    )
    loaded: Any = AutoModelForCausalLM.from_pretrained(str(folder))
    assert loaded.generation_config.eos_token_id == [2]
    assert loaded.generation_config.pad_token_id == 3
    passport = json.loads((folder / "passport.json").read_text(encoding="utf-8"))
    assert (passport["precision"], len(passport["prompts"])) == ("float32", 3)
    assert not list(tmp_path.glob(".*"))


def test_shards_are_small_and_indexed(tmp_path: Path, merge_into: Merge) -> None:
    model = write_model(tmp_path / "model")
    merge_into(write_adapter(tmp_path / "adapter", model), model, shard_gb=1e-4)
    files = sorted((tmp_path / "merged").glob("model-*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size <= 1e5 + 4096 for file in files)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in files for t in load_file(file).values())
    # The shards of a merged model can be merged into again.
    again = write_adapter(tmp_path / "again", tmp_path / "merged")
    assert merge_into(again, tmp_path / "merged", out=tmp_path / "second")["within_tolerance"]


def test_a_head_beside_the_embedding_it_is_tied_to_is_left_out(tmp_path: Path, merge_into: Merge) -> None:
    model = write_model(tmp_path / "model", "tied")
    stored = load_file(model / "model.safetensors")
    both = {**stored, "lm_head.weight": stored["model.embed_tokens.weight"].clone()}
    save_file(both, model / "model.safetensors", {"format": "pt"})
    words = ["model.add_tokens=['<a>']"]
    report = merge_into(write_adapter(tmp_path / "adapter", model, *words), model, *words)
    assert report["tied_embeddings"]
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, merge_into: Merge, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter", model)
    before = sorted(tmp_path.iterdir())
    usage = type("usage", (), {"free": 1_000_000})
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(StorageError, match=r"needs 0\.06 GB and 0\.00 GB are free") as refused:
        merge_into(adapter, model)
    assert refused.value.exit_code == 8
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": "int8"}, "base=int8: the adapter was trained on nf4. Choose one of nf4, bf16."),
        ({"out": None}, "out: this adapter is in no run"),
        ({"out": Path("model")}, "exists and is no merged model"),
    ],
)
def test_words_that_do_not_fit_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path, merge_into: Merge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = write_model(tmp_path / "model")
    with pytest.raises(ConfigError) as refused:
        merge_into(write_adapter(tmp_path / "adapter", model), model, **settings)
    assert message in str(refused.value)
    assert (model / "config.json").is_file()


def test_an_earlier_merge_is_replaced_only_when_asked(tmp_path: Path, merge_into: Merge) -> None:
    model = write_model(tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter", model)
    merge_into(adapter, model)
    (tmp_path / "merged" / "old").touch()
    with pytest.raises(ConfigError, match="overwrite=true"):
        merge_into(adapter, model)
    assert (tmp_path / "merged" / "old").is_file()
    merge_into(adapter, model, overwrite=True)
    assert not (tmp_path / "merged" / "old").exists()


def test_another_base_and_whole_models_are_refused(tmp_path: Path, merge_into: Merge) -> None:
    model = write_model(tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter", model)
    other = write_model(tmp_path / "other", "tied")
    with pytest.raises(CheckpointError, match="belongs to another base model"):
        merge_into(adapter, other)
    with pytest.raises(ConfigError, match="has no adapter to merge"):
        merge_into(model, model)
