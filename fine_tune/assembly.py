"""From the plain values of a checked config to the typed parts of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fine_tune.data.prepare import PrepareSpec
from fine_tune.device import DTYPES, DevicePlan
from fine_tune.errors import ConfigError
from fine_tune.kept import Kept
from fine_tune.models.adapter import AdapterSpec, attach
from fine_tune.models.base import BaseSpec, load_base
from fine_tune.models.dense_base import make_dense
from fine_tune.models.tokenizer import load_tokenizer
from fine_tune.models.vocabulary import fit_vocabulary
from fine_tune.modules.optim import OptimSpec
from fine_tune.modules.parallel import FlatSumStrategy
from fine_tune.rng import seed_everything
from fine_tune.targets import build, resolve
from fine_tune.text.template import AUTO, ChatTemplate, fitting_template, load_template

PREPARE_KEYS = PrepareSpec.__dataclass_fields__.keys()


def prepare_spec(cfg: Mapping[str, Any]) -> PrepareSpec:
    """Take the keys of ``data`` that decide which tokens there are, with held-out items enough for the previews too."""
    preview = cfg["callbacks"].get("preview")
    shown = preview["num_prompts"] if preview and preview["prompts"] is None else 0
    values = {key: value for key, value in cfg["data"].items() if key in PREPARE_KEYS}
    return PrepareSpec(**{**values, "num_eval_items": max(cfg["data"]["num_eval_items"], shown)})


def load_text(model: Mapping[str, Any], folder: Path) -> tuple[PreTrainedTokenizerBase, ChatTemplate]:
    """Load tokenizer and chat template; neither takes the other's defaults."""
    tokenizer = load_tokenizer(
        folder,
        pad_token=model["pad_token"],
        add_tokens=model["add_tokens"],
        trust_remote_code=model["trust_remote_code"],
    )
    name = model["chat_template"]
    template = load_template(
        fitting_template(tokenizer.get_vocab()) if name == AUTO else name,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        end_of_turn=model["end_of_turn"],
    )
    if tokenizer.pad_token == template.end_of_turn:
        raise ConfigError(
            f"model.pad_token={tokenizer.pad_token}: it ends the turns of model.chat_template={template.name}, and a model "
            "that learns to ignore padding would not stop. Set model.pad_token to another token."
        )
    return tokenizer, template


def load_bare(
    cfg: Mapping[str, Any], folder: Path, tokenizer: PreTrainedTokenizerBase, plan: DevicePlan
) -> PreTrainedModel:
    """Load the base as ``method`` stores it and make room for new tokens."""
    model, method = cfg["model"], cfg["method"]
    trains_all = method["trains"] == "all"
    network = load_base(
        BaseSpec(
            folder=folder,
            bits=method["bits"],
            # What trains is stored in float32 whatever model.dtype says: half precision loses small updates.
            dtype=torch.float32 if trains_all else DTYPES[model["dtype"]],
            compute_dtype=plan.compute_dtype,
            device=plan.device,
            quant_type=method["quant_type"],
            double_quant=method["double_quant"],
            trust_remote_code=model["trust_remote_code"],
        )
    )
    fit_vocabulary(network, len(tokenizer), _new_tokens(model, tokenizer))
    return network


def _new_tokens(model: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return sorted(tokenizer.get_vocab()[token] for token in model["add_tokens"])


def load_network(
    cfg: Mapping[str, Any],
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    plan: DevicePlan,
    *,
    dense_base: bool = False,
    kept: Kept | None = None,
    identity: str = "",
) -> nn.Module:
    """Load the base, made dense if that is asked for, and attach what trains.

    Args:
        cfg: A checked config.
        folder: The model's folder.
        tokenizer: Its tokenizer, new tokens included.
        plan: Where it runs.
        dense_base: Dequantise a 4-bit base once.
        kept: Bases of earlier runs of this process; one of the same tensors is not loaded again.
        identity: Fingerprint of the folder's weights.
    """

    def load() -> PreTrainedModel:
        network = load_bare(cfg, folder, tokenizer, plan)
        if dense_base:
            # Without autocast a plain layer multiplies in the dtype that the rest of the model is stored in.
            plain = plan.precision == "32-true"
            make_dense(network, DTYPES[cfg["model"]["dtype"]] if plain else plan.compute_dtype)
        return network

    if kept is not None and is_shared(cfg):
        network = kept.base(base_key(cfg, tokenizer, plan, dense_base, identity), load)
    else:
        if kept is not None:
            # It would lie beside this run's own.
            kept.forget()
        network = load()
    # Seeded here and not earlier: loading a base must not move the adapter's first values.
    seed_everything(cfg["seed"])
    return attach(network, adapter_spec(cfg, tokenizer))  # type: ignore[arg-type]


def is_shared(cfg: Mapping[str, Any]) -> bool:
    """Tell whether runs may share a base.

    Weights that train are a run's own, and 8-bit layers move their weights into states of their own when they first run.
    """
    method = cfg["method"]
    return bool(method["trains"] != "all" and method["bits"] != 8)


def base_key(
    cfg: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, plan: DevicePlan, dense_base: bool, identity: str
) -> tuple[Any, ...]:
    """Name everything that decides a frozen base's tensors and how its layers multiply."""
    model, method = cfg["model"], cfg["method"]
    return (
        identity, model["path"], model["revision"], model["dtype"], model["trust_remote_code"], len(tokenizer),
        tuple(_new_tokens(model, tokenizer)), method["bits"], method["quant_type"], method["double_quant"],
        str(plan.device), str(plan.compute_dtype), plan.precision, dense_base,
    )  # fmt: skip


def adapter_spec(cfg: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> AdapterSpec:
    """Take what trains from ``method``, and the ids of new tokens."""
    method = cfg["method"]
    if method["trains"] == "all":
        return AdapterSpec(trains="all")
    return AdapterSpec(
        trains="adapter",
        rank=method["rank"],
        alpha=method["alpha"],
        dropout=method["dropout"],
        target_modules=method["target_modules"],
        rank_stabilized=method["rank_stabilized"],
        use_dora=method["use_dora"],
        new_tokens=_new_tokens(cfg["model"], tokenizer),
    )


def optim_spec(optim: Mapping[str, Any]) -> OptimSpec:
    """Take the optimizer's class and numbers."""
    return OptimSpec(
        build=resolve(optim["_target_"]),
        lr=optim["lr"],
        betas=tuple(optim["betas"]),
        eps=optim["eps"],
        weight_decay=optim["weight_decay"],
        max_grad_norm=optim["max_grad_norm"],
        schedule=optim["schedule"],
        warmup_share=optim["warmup_share"],
        schedule_options=optim["schedule_options"],
    )


def chosen_callbacks(cfg: Mapping[str, Any]) -> dict[str, pl.Callback]:
    """Build the callbacks that the config names; null ones are off."""
    return {name: build(node) for name, node in cfg["callbacks"].items() if node is not None}


def make_trainer(
    trainer: Mapping[str, Any],
    plan: DevicePlan,
    *,
    folder: Path,
    callbacks: list[pl.Callback],
    loggers: list[Any],
    steps: tuple[int, int],
) -> pl.Trainer:
    """Configure Lightning: the whole run is one pass over optimizer steps, ``steps`` = (already done, in all)."""
    done, total = steps
    distributed = plan.num_ranks > 1
    return pl.Trainer(
        accelerator=plan.accelerator,
        devices=trainer["devices"] if distributed else [plan.device.index or 0] if plan.accelerator == "gpu" else 1,
        num_nodes=trainer["num_nodes"],
        strategy=FlatSumStrategy(process_group_backend="nccl" if plan.accelerator == "gpu" else "gloo")
        if distributed
        else "auto",
        precision=plan.precision,  # type: ignore[arg-type]
        max_steps=total,
        max_epochs=1,
        val_check_interval=trainer["val_every_n_steps"] or total,
        check_val_every_n_epoch=None,
        # Lightning's sanity check, over all of the validation rows, is the validation of step 0.
        num_sanity_val_steps=0 if done else -1,
        default_root_dir=str(folder),
        callbacks=callbacks,
        logger=loggers or False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        # Named, so that Lightning's SLURM mode with checkpoints of its own never starts.
        plugins=[TorchElasticEnvironment() if distributed else LightningEnvironment()],
        deterministic=trainer["deterministic"],
        benchmark=False,
        log_every_n_steps=1,
    )
