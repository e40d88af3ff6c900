"""The numbers that the config tree promises."""

from __future__ import annotations

import pytest

from fine_tune.config import check_config
from fine_tune.errors import ConfigError
from fine_tune.rules import select


def value(key: str, *overrides: str) -> object:
    return select(check_config(list(overrides)).cfg, key)


def test_plain_train_is_the_built_in_job() -> None:
    cfg = check_config([]).cfg
    assert (cfg["model"]["path"], cfg["data"]["format"], cfg["method"]["bits"]) == (
        "builtin:tiny",
        "world",
        4,
    )
    assert cfg["trainer"]["max_steps"] is not None
    assert cfg["trainer"]["max_epochs"] is None
    assert cfg["optim"]["lr"] == 1e-3


@pytest.mark.parametrize("overrides", [["model=llama2_7b", "data=oasst1"], ["model=qwen"]])
def test_the_recipe_of_the_built_in_model_leaves_every_other_model_alone(overrides: list[str]) -> None:
    cfg = check_config(overrides).cfg
    assert (cfg["optim"]["lr"], cfg["optim"]["global_batch_size"]) == (2e-4, 16)
    assert (cfg["trainer"]["max_steps"], cfg["trainer"]["max_epochs"]) == (None, 1)


def test_the_recipe_holds_for_any_data_and_optimizer_and_yields_to_typed_values() -> None:
    recipe = value("optim.lr")
    assert value("optim.lr", "data=oasst1") == recipe
    assert value("optim.lr", "data=world_sft", "model=tiny") == recipe
    assert value("optim.lr", "optim=paged_adamw_8bit") == recipe
    assert value("optim.lr", "optim.lr=1e-5") == 1e-5


@pytest.mark.parametrize(
    ("experiment", "key", "stated"),
    [
        ("llama2_instruct_22k", "data.max_examples", 22_000),
        ("llama2_instruct_22k", "model.name", "llama2_7b"),
        ("llama2_chat_guanaco1k", "data.hub", "mlabonne/guanaco-llama2-1k"),
        ("llama2_chat_guanaco1k", "method.rank", 64),
        ("llama2_chat_guanaco1k", "method.alpha", 16),
        ("llama2_chat_guanaco1k", "method.dropout", 0.1),
        ("llama2_chat_guanaco1k", "method.quant_type", "nf4"),
        ("llama2_chat_guanaco1k", "optim.name", "paged_adamw_32bit"),
        ("llama2_chat_guanaco1k", "model.chat_template", "llama2"),
        ("mistral_instruct", "method.target_modules", ["q_proj", "v_proj"]),
        ("mistral_instruct", "trainer.precision", "16-mixed"),
        ("mistral_instruct", "data.answer_rule", "whole"),
        ("llama2_oasst1_qlora", "method.bits", 4),
        ("llama2_oasst1_lora", "method.bits", 16),
        ("llama2_oasst1_lora", "model.dtype", "bfloat16"),
        ("phi2_oasst1", "data.max_seq_len", 256),
        ("phi2_oasst1", "data.max_examples", 32_000),
        ("phi2_oasst1", "callbacks.preview.every_n_steps", 100),
        ("phi2_oasst1", "trainer.precision", "16-mixed"),
        ("phi2_oasst1", "model.add_tokens", ["<|im_start|>", "<|im_end|>"]),
        ("llama2_chat_guanaco1k", "method.bits", 4),
        ("llama2_chat_guanaco1k", "trainer.precision", "16-mixed"),
        ("llama2_chat_guanaco1k", "trainer.capability", "sm75"),
        ("llama2_chat_guanaco1k", "trainer.memory_limit_gb", 15),
        ("llama2_chat_guanaco1k", "model.dtype", "float16"),
        ("phi2_oasst1", "trainer.capability", "sm75"),
        ("phi2_oasst1", "trainer.memory_limit_gb", 15),
        ("phi2_oasst1", "model.dtype", "float16"),
        ("mistral_instruct", "trainer.memory_limit_gb", 12),
        ("mistral_instruct", "trainer.capability", None),
        ("mistral_instruct", "method.bits", 4),
        ("llama2_oasst1_qlora", "model.dtype", "bfloat16"),
        ("llama2_oasst1_lora", "method.trains", "adapter"),
    ],
)
def test_studies_carry_what_they_state(experiment: str, key: str, stated: object) -> None:
    rows = ["data.path=rows.jsonl"] if experiment in ("llama2_instruct_22k", "mistral_instruct") else []
    assert value(key, f"experiment={experiment}", *rows) == stated


@pytest.mark.parametrize("trainer", ["t4", "rtx3060"])
def test_a_small_card_is_one_word(trainer: str) -> None:
    cfg = check_config([f"trainer={trainer}"]).cfg["trainer"]
    assert (cfg["accelerator"], cfg["precision"], cfg["devices"]) == ("gpu", "16-mixed", 1)
    assert (cfg["capability"], cfg["memory_limit_gb"]) == {"t4": ("sm75", 15), "rtx3060": (None, 12)}[trainer]


def test_a_t4_refuses_bfloat16_with_what_to_write_instead() -> None:
    for words, wanted in (
        (["model=llama2_7b"], "model.dtype = bfloat16: trainer.capability=sm75 has no bf16. Pass model.dtype=float16."),
        (["trainer.precision=bf16-mixed"], "trainer.precision = bf16-mixed: trainer.capability=sm75 has no bf16."),
    ):
        with pytest.raises(ConfigError) as refused:
            check_config(["trainer=t4", *words])
        assert any(problem.startswith(wanted) for problem in refused.value.problems)
    assert value("model.dtype", "trainer=t4", "model=llama2_7b", "model.dtype=float16") == "float16"
    assert value("model.dtype", "trainer=rtx3060", "model=llama2_7b") == "bfloat16"


def test_qlora_and_lora_studies_differ_in_the_method_alone() -> None:
    qlora, lora = (check_config([f"experiment=llama2_oasst1_{method}"]).cfg for method in ("qlora", "lora"))
    differing = [key for key in qlora if qlora[key] != lora[key]]
    assert differing == ["method"]
    changed = {key for key in qlora["method"] if qlora["method"][key] != lora["method"][key]}
    assert changed == {"name", "bits", "quant_type", "double_quant"}


def test_a_typed_value_wins_over_experiment_and_debug() -> None:
    words = ["experiment=phi2_oasst1", "debug=fast", "data.max_seq_len=128", "optim.global_batch_size=2"]
    cfg = check_config(words).cfg
    assert (cfg["data"]["max_seq_len"], cfg["optim"]["global_batch_size"], cfg["trainer"]["max_steps"]) == (
        128,
        2,
        3,
    )


def test_an_experiment_may_be_moved_to_another_model() -> None:
    cfg = check_config(["experiment=llama2_chat_guanaco1k", "model=tiny", "data.path=rows.jsonl"]).cfg
    assert (cfg["model"]["name"], cfg["method"]["rank"]) == ("tiny", 64)


@pytest.mark.parametrize(
    ("typed", "gives_way"),
    [
        ("trainer.max_epochs=2", ["trainer.max_steps"]),
        ("data.path=rows.jsonl", ["data.hub", "data.revision"]),
        ("model.path=../weights/base", ["model.revision"]),
    ],
)
def test_a_typed_value_replaces_the_default_of_its_alternative(typed: str, gives_way: list[str]) -> None:
    chosen = ["model=llama2_7b", "data=oasst1", "debug=fast"]
    for key in gives_way:
        assert value(key, *chosen) is not None
        assert value(key, *chosen, typed) is None


def test_a_callback_is_switched_off_with_null_and_settings_for_absent_ones_are_dropped() -> None:
    assert "preview" not in check_config(["callbacks.preview=null"]).cfg["callbacks"]
    assert check_config(["callbacks=none", "debug=fast"]).cfg["callbacks"] == {}
    assert check_config(["callbacks=none", "callbacks.preview=null"]).cfg["callbacks"] == {}


def test_references_between_values_are_resolved() -> None:
    cfg = check_config(["data.max_new_tokens=33", "seed=7", "data.split_seed=${seed}"]).cfg
    assert cfg["callbacks"]["preview"]["max_new_tokens"] == 33
    assert cfg["data"]["split_seed"] == 7


def test_the_config_is_plain_data() -> None:
    def kinds(tree: object) -> set[type]:
        inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
        return {type(tree)}.union(*(kinds(part) for part in inner))

    assert kinds(check_config(["experiment=phi2_oasst1"]).cfg) <= {
        dict,
        list,
        str,
        int,
        float,
        bool,
        type(None),
    }
