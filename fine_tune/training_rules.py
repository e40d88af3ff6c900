"""Rules about the model, what trains, the optimizer and the devices."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fine_tune.rules import Rules

RULES = Rules()
COMMIT = re.compile(r"[0-9a-f]{40}")
TEMPLATES = Path(__file__).parent / "text" / "templates"
# Settings each schedule of transformers takes beyond warmup, and those it cannot do without.
SCHEDULE_OPTIONS = {
    "linear": (set(), set()),
    "constant": (set(), set()),
    "constant_with_warmup": (set(), set()),
    "cosine": ({"num_cycles"}, set()),
    "cosine_with_restarts": ({"num_cycles"}, set()),
    "polynomial": ({"lr_end", "power"}, set()),
    "inverse_sqrt": ({"timescale"}, set()),
    "cosine_with_min_lr": ({"num_cycles", "min_lr", "min_lr_rate"}, {"min_lr|min_lr_rate"}),
    "cosine_warmup_with_min_lr": (
        {"num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"},
        {"min_lr|min_lr_rate"},
    ),
    "warmup_stable_decay": (
        {"num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"},
        {"num_decay_steps"},
    ),
}
# What a tracker's class cannot do without.
TRACKER_PACKAGES = {
    "WandbTracker": "wandb", "WandbLogger": "wandb", "TensorBoardLogger": "tensorboard", "MLFlowLogger": "mlflow",
    "CometLogger": "comet_ml",
}  # fmt: skip
ADAPTER_KEYS = ("rank", "alpha", "dropout", "target_modules")


@RULES.on("trainer.micro_batch_tokens", "data.max_seq_len", "data.batch")
def _micro_batch_holds_a_sample(micro: int | str, longest: int, batch: str) -> str | None:
    # Pairs need more: fine_tune.preference_rules.
    if isinstance(micro, str) or micro >= longest or batch == "pairs":
        return None
    return (
        f"trainer.micro_batch_tokens = {micro}: must be at least data.max_seq_len ({longest}). "
        f"Pass trainer.micro_batch_tokens={longest} or a smaller data.max_seq_len."
    )


@RULES.on("trainer.micro_batch_tokens", "trainer.num_nodes")
def _machines_choose_alike(micro: int | str, num_nodes: int) -> str | None:
    if num_nodes == 1 or not isinstance(micro, str):
        return None
    return (
        "trainer.micro_batch_tokens = auto: several machines cannot see each other's memory. "
        "Pass a number, such as trainer.micro_batch_tokens=4096."
    )


@RULES.on("trainer.max_steps", "trainer.max_epochs")
def _one_length(steps: int | None, epochs: float | None) -> str | None:
    if (steps is None) != (epochs is None):
        return None
    return "trainer.max_steps and trainer.max_epochs: exactly one must be set. Set the other to null."


@RULES.on("trainer.dense_base", "method.bits")
def _only_4_bits_become_dense(dense: bool | None, bits: int) -> str | None:
    if not dense or bits == 4:
        return None
    # LLM.int8 rounds activations as well, so that dense weights would compute something else.
    return f"trainer.dense_base = true: is for a 4-bit base, and method.bits is {bits}. Use method=qlora, or leave it out."


@RULES.on("method.trains", "method.bits")
def _quantised_weights_do_not_train(trains: str, bits: int) -> str | None:
    if trains == "adapter" or bits == 16:
        return None
    return f"method.bits = {bits}: quantised weights cannot train. Use method=full, or method=qlora."


@RULES.on("method.trains", *(f"method.{key}" for key in ADAPTER_KEYS))
def _adapter_has_its_settings(trains: str, *settings: Any) -> str | None:
    missing = [f"method.{key}" for key, value in zip(ADAPTER_KEYS, settings, strict=True) if value is None]
    given = [f"method.{key}" for key, value in zip(ADAPTER_KEYS, settings, strict=True) if value is not None]
    if trains == "adapter" and missing:
        return f"{missing[0]} = null: an adapter needs it. Pass {missing[0]}=<value>."
    if trains == "all" and given:
        return f"{given[0]}: method.trains=all has no adapter. Leave it null, or use method=lora."
    return None


@RULES.on("method.trains", "method.use_dora", "method.rank_stabilized")
def _adapter_switches(trains: str, dora: bool, stabilized: bool) -> str | None:
    if trains == "adapter" or not (dora or stabilized):
        return None
    key = "method.use_dora" if dora else "method.rank_stabilized"
    return f"{key} = true: method.trains=all has no adapter. Set it to false, or use method=lora."


@RULES.on("method.bits", "method.quant_type", "method.double_quant")
def _four_bit_settings(bits: int, quant_type: str | None, double: bool) -> str | None:
    if bits == 4 and quant_type is None:
        return "method.quant_type = null: 4 bits need a grid. Pass method.quant_type=nf4."
    if bits != 4 and (quant_type is not None or double):
        key = "method.quant_type" if quant_type is not None else "method.double_quant"
        return f"{key}: only for method.bits=4, and it is {bits}. Use method=qlora."
    return None


@RULES.on("trainer.precision", "trainer.accelerator")
def _fp16_needs_a_gpu(precision: str, accelerator: str) -> str | None:
    if precision != "16-mixed" or accelerator != "cpu":
        return None
    return "trainer.precision = 16-mixed: not on the CPU. Pass trainer.precision=32-true or bf16-mixed."


@RULES.on("trainer.capability", "trainer.precision", "model.dtype")
def _sm75_has_no_bf16(capability: str | None, precision: str, dtype: str) -> str | None:
    if capability != "sm75":
        return None
    if precision == "bf16-mixed":
        return "trainer.precision = bf16-mixed: trainer.capability=sm75 has no bf16. Pass trainer.precision=16-mixed."
    if dtype == "bfloat16":
        return "model.dtype = bfloat16: trainer.capability=sm75 has no bf16. Pass model.dtype=float16."
    return None


@RULES.on("trainer.strategy", "trainer.devices", "trainer.num_nodes")
def _several_devices(strategy: str, devices: int, nodes: int) -> str | None:
    if strategy == "ddp" or devices * nodes == 1:
        return None
    return f"trainer.devices = {devices}: several devices need trainer.strategy=ddp. Pass trainer=ddp."


@RULES.on("model.trust_remote_code", "model.revision", "model.path")
def _own_code_is_pinned(trust: bool, revision: str | None, path: str) -> str | None:
    if not trust or _is_local(path) or COMMIT.fullmatch(revision or ""):
        return None
    return (
        "model.trust_remote_code = true: code is only run from a pinned commit or a local folder. "
        "Pass model.revision=<40 hex digits>."
    )


@RULES.on("model.path", "model.revision")
def _hub_model_is_pinned(path: str, revision: str | None) -> str | None:
    if _is_local(path) or revision is not None:
        return None
    return f"model.path = {path}: a hub model needs a revision. Pass model.revision=<commit>, or main."


@RULES.on("model.chat_template")
def _template_exists(template: str) -> str | None:
    shipped = sorted(file.stem for file in TEMPLATES.glob("*.jinja"))
    is_file = template.endswith(".jinja") and Path(template).expanduser().is_file()
    if is_file or template in ("auto", *shipped):
        return None
    names = ", ".join(["auto", *shipped])
    return f"model.chat_template = {template}: no such template. Pass a .jinja file, or one of {names}."


@RULES.on("model.pad_token", "model.end_of_turn")
def _pad_is_not_end(pad: str | None, end: str | None) -> str | None:
    if pad is None or pad != end:
        return None
    return f"model.pad_token = {pad}: must differ from model.end_of_turn. Leave it null to have one chosen."


@RULES.on("trainer.val_every_n_steps", "callbacks.early_stopping", "callbacks.checkpoint")
def _validation_happens(every: int | None, stopping: Any, checkpoint: Any) -> str | None:
    best = bool(checkpoint and checkpoint.get("use_best"))
    if every is not None or not (stopping or best):
        return None
    key = "callbacks.early_stopping" if stopping else "callbacks.checkpoint.use_best"
    return f"{key}: needs validation during the run. Pass trainer.val_every_n_steps=<steps>."


@RULES.on("logger")
def _trackers_are_installed(loggers: Mapping[str, Any] | None) -> str | None:
    for name, node in (loggers or {}).items():
        target = str((node or {}).get("_target_", ""))
        package = next((needed for end, needed in TRACKER_PACKAGES.items() if target.endswith(f".{end}")), None)
        if package and not _installed(package):
            return f"logger.{name}: needs the package {package}. Run pip install {package}, or pass logger=none."
    return None


def _installed(package: str) -> bool:
    # A folder of that name where the command was typed, such as W&B's own, is not the package.
    found = find_spec(package)
    return found is not None and found.origin is not None


@RULES.on("optim.schedule", "optim.warmup_share")
def _constant_has_no_warmup(schedule: str, warmup: float) -> str | None:
    if schedule != "constant" or warmup == 0:
        return None
    return f"optim.warmup_share = {warmup}: constant has none. Pass optim.schedule=constant_with_warmup."


@RULES.on("optim.schedule", "optim.schedule_options")
def _schedule_takes_its_options(schedule: str, options: Mapping[str, Any]) -> str | None:
    allowed, needed = SCHEDULE_OPTIONS[schedule]
    if unknown := sorted(set(options) - allowed):
        known = ", ".join(sorted(allowed)) or "none"
        return f"optim.schedule_options.{unknown[0]}: schedule {schedule} does not take it. It takes: {known}."
    for name in sorted(needed):
        if not any(choice in options for choice in name.split("|")):
            key = f"optim.schedule_options.{name.split('|')[0]}"
            return f"{key}: no value, and schedule {schedule} needs it. Pass {key}=<value>."
    return None


def _is_local(path: str) -> bool:
    folder = Path(path).expanduser()
    return path.startswith(("builtin:", "/", "./", "../", "~")) or folder.is_dir()
