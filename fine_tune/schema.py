"""The typed schema of a resolved config: which keys exist, their types and their ranges.

Every field is required, because every default lives in ``conf/``. Rules that involve several keys are in
``fine_tune.rules``. Nothing here imports torch, so that a wrong config is refused at once.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field

from fine_tune.logger_schema import Loggers
from fine_tune.schema_types import (
    AtLeast0,
    AtLeast1,
    Batch,
    BelowHalf,
    BelowOne,
    Node,
    NotNegative,
    Plugin,
    Positive,
    RunName,
    Seed,
    Share,
    TargetModules,
    Text,
)
from fine_tune.sweep_schema import Sweep

# How the rows of one source are read; a mix has several sources.
RowFormat = Literal[
    "world", "oasst1", "guanaco", "guanaco_llama2", "instructions", "chat", "text",
    "world_pairs", "ultrafeedback", "hh_rlhf", "oasst1_pairs", "preferences",
]  # fmt: skip


class Model(Node):
    """The base model, its tokenizer and its chat form."""

    name: Text
    path: Text
    revision: Text | None
    dtype: Literal["float32", "bfloat16", "float16"]
    chat_template: Text
    end_of_turn: Text | None
    pad_token: Text | None
    add_tokens: list[Text]
    trust_remote_code: bool
    gated: bool


class Method(Node):
    """In how many bits the base is stored, and what trains."""

    name: Text
    bits: Literal[4, 8, 16]
    trains: Literal["adapter", "all"]
    quant_type: Literal["nf4", "fp4"] | None
    double_quant: bool
    rank: AtLeast1 | None
    alpha: Positive | None
    dropout: BelowOne | None
    target_modules: TargetModules | None
    rank_stabilized: bool
    use_dora: bool


class Source(Node):
    """Where the rows of one source of a mix come from; it names only what it has."""

    format: RowFormat
    path: Text | None = None
    hub: Text | None = None
    subset: Text | None = None
    revision: Text | None = None
    hub_split: Text = "train"
    options: dict[str, Any] = Field(default_factory=dict)
    weight: Positive = 1.0


class Data(Node):
    """The rows, how they are split, and what happens to those that do not fit."""

    target: Text = Field(alias="_target_")
    name: Text
    batch: Batch
    format: Literal[RowFormat, "mix"]
    path: Text | None
    hub: Text | None
    subset: Text | None
    revision: Text | None
    hub_split: Text
    options: dict[str, Any]
    sources: dict[str, Source] | None
    val_path: Text | None
    val_share: BelowOne
    max_val_examples: AtLeast1 | None
    split_seed: Seed
    max_seq_len: Annotated[int, Field(ge=8)]
    max_examples: AtLeast1 | None
    lint: Literal["drop", "report", "error"] | None
    overflow: Literal["drop", "truncate_prompt", "truncate_completion", "keep_last_turns", "error"]
    max_lost_share: Share
    cache_dir: Text | None
    answer_rule: Literal["first_sentence", "whole"] | None
    num_eval_items: AtLeast0
    max_new_tokens: AtLeast1


class SFTObjective(Node):
    """Cross-entropy on completions."""

    target: Text = Field(alias="_target_")
    name: Literal["sft"]
    accepts: list[Batch]
    default_lr: Positive
    head_chunk_tokens: AtLeast1


class DPOObjective(Node):
    """Preferences against a named reference."""

    target: Text = Field(alias="_target_")
    name: Literal["dpo"]
    accepts: list[Batch]
    default_lr: Positive
    head_chunk_tokens: AtLeast1
    loss: Literal["sigmoid", "ipo", "hinge", "robust"]
    beta: Positive
    label_smoothing: BelowHalf
    nll_weight: NotNegative
    reference: Text
    allow_other_start: bool
    reference_store: Text | None


# By the name that chooses among them.
OBJECTIVES: dict[str, type[Node]] = {"sft": SFTObjective, "dpo": DPOObjective}
Objective = Annotated[SFTObjective | DPOObjective, Field(discriminator="name")]


class Optim(Node):
    """Optimizer, learning-rate schedule and the size of a step."""

    name: Text
    target: Text = Field(alias="_target_")
    lr: Positive
    betas: Annotated[list[BelowOne], Field(min_length=2, max_length=2)]
    eps: Positive
    weight_decay: NotNegative
    max_grad_norm: Positive | None
    schedule: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
        "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
    ]  # fmt: skip
    warmup_share: BelowOne
    schedule_options: dict[str, Any]
    global_batch_size: AtLeast1


class Trainer(Node):
    """Devices, precision and the length of the run."""

    accelerator: Literal["auto", "cpu", "gpu"]
    devices: AtLeast1
    num_nodes: AtLeast1
    strategy: Literal["auto", "ddp"]
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"]
    capability: Literal["sm75"] | None
    memory_limit_gb: Positive | None
    max_steps: AtLeast1 | None
    max_epochs: Positive | None
    val_every_n_steps: AtLeast1 | None
    micro_batch_tokens: AtLeast1 | Literal["auto"]
    speed: Literal["auto", "plain", "fast", "balanced", "lean"]
    recompute: Literal["none", "selective", "full"] | None
    offload: bool | None
    compile: bool | None
    fused_lora: bool | None
    dense_base: bool | None
    num_workers: AtLeast0
    deterministic: bool
    checklist: bool
    max_skipped_steps: AtLeast0


class Preview(Node):
    """Answers to fixed prompts while the run goes on."""

    target: Text = Field(alias="_target_")
    every_n_steps: AtLeast1
    num_prompts: AtLeast1
    prompts: list[Text] | None
    max_new_tokens: AtLeast1


class Checkpoint(Node):
    """When checkpoints are written and which are kept."""

    target: Text = Field(alias="_target_")
    every_n_steps: AtLeast1
    keep: AtLeast1
    keep_best: bool
    use_best: bool


class Throughput(Node):
    """Tokens per second, utilisation and peak memory."""

    target: Text = Field(alias="_target_")
    peak_tflops: Positive | None


class EarlyStopping(Node):
    """Stop when a metric no longer improves."""

    target: Text = Field(alias="_target_")
    monitor: Text
    patience: AtLeast0
    min_delta: NotNegative
    mode: Literal["min", "max"]


class Progress(Node):
    """The progress bar."""

    target: Text = Field(alias="_target_")
    refresh_seconds: Positive


class Preferences(Node):
    """When a preference run warns in words."""

    target: Text = Field(alias="_target_")
    max_chosen_drop: Positive
    max_margin: Positive


class Callbacks(BaseModel):
    """Callbacks by name; null is off, and a name not listed here must bring its own ``_target_``."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    __pydantic_extra__: dict[str, Plugin | None]
    preview: Preview | None = None
    checkpoint: Checkpoint | None = None
    throughput: Throughput | None = None
    early_stopping: EarlyStopping | None = None
    progress: Progress | None = None
    preferences: Preferences | None = None


class Config(Node):
    """A whole resolved config of a training run."""

    seed: Seed
    run_name: RunName | None
    run_dir: Text | None
    sweep_dir: Text | None
    resume: Text | None
    init_from: Text | None
    overwrite: bool
    hints: dict[str, str]
    model: Model
    method: Method
    data: Data
    objective: Objective
    optim: Optim
    trainer: Trainer
    callbacks: Callbacks
    logger: Loggers
    # Which jobs a sweep has; none of its jobs sees it.
    sweep: Sweep | None = None


def known_keys(node: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Return every dotted key of the schema, groups included.

    Example:
        >>> "optim.lr" in known_keys(), "optim.lrr" in known_keys()
        (True, False)
    """
    keys: list[str] = []
    for name, field in node.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        keys.append(key)
        for part in _models_in(field.annotation):
            keys += known_keys(part, f"{key}.")
    return list(dict.fromkeys(keys))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    # dict[str, Source] has free names below it, so its fields have no fixed dotted key.
    if get_origin(annotation) is dict:
        return []
    return [part for inner in get_args(annotation) for part in _models_in(inner)]
