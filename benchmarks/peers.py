"""TRL or Unsloth on the workload of workload.py; prints one JSON line of real tokens/s, samples/s and peak memory.

    python benchmarks/peers.py trl sft FOLDER batch_size=16 steps=12 warm=4 [liger=1] [checkpointing=0] [base=dense]
    python benchmarks/peers.py unsloth dpo FOLDER batch_size=8 steps=8 warm=3 [checkpointing=0|1|unsloth]
    python benchmarks/peers.py trl sft FOLDER batch_size=16 steps=40 [base=nf4] [packing=1 | sampler=group_by_length]

Both run as their documentation shows: LoRA of rank 64 on all linear layers, NF4 with double quantisation, bf16, fused AdamW. On a
CPU only TRL runs, in float32, quantised if asked. Where the model's tokenizer has a chat template, rows are handed over as messages
and TRL renders them; tokens are counted in the batches that the model gets, without padding.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def read_rows(folder: Path, kind: str, count: int) -> tuple[list[dict[str, Any]], float | None]:
    """Read as many rows as will be used, in the peers' own form, and their mean length in tokens (one word is one token).

    Of rows for a chat template no length is known: their tokens are counted in training.
    """
    lines = (folder / ("rows.jsonl" if kind == "sft" else "pairs.jsonl")).read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    if (folder / "model" / "chat_template.jinja").exists():
        talks = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in found]
        return [talks[i % len(talks)] for i in range(count)], None
    if kind == "sft":
        found = [dict(zip(("prompt", "completion"), (m["content"] for m in row["messages"]), strict=True)) for row in found]
        found = [{"prompt": row["prompt"] + " ", "completion": row["completion"]} for row in found]
    else:
        found = [{"prompt": row["prompt"] + " ", "chosen": row["chosen"], "rejected": row["rejected"]} for row in found]
    rows = [found[i % len(found)] for i in range(count)]
    return rows, sum(len(text.split()) for row in rows for text in row.values()) / count


def trl_parts(model_folder: Path, options: dict[str, str]) -> dict[str, Any]:
    """Load the model as TRL's examples do; its trainer adds the adapter."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    gpu = torch.cuda.is_available()
    quantised = options.get("base", "nf4" if gpu else "dense") == "nf4"
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if gpu else torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        str(model_folder),
        quantization_config=quantisation if quantised else None,
        dtype=torch.bfloat16 if gpu else torch.float32,
        device_map={"": 0} if gpu else None,
        attn_implementation="sdpa",
    )
    lora = LoraConfig(
        r=int(options.get("rank", 64)), lora_alpha=int(options.get("alpha", 16)), lora_dropout=0.0, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return {"model": model, "processing_class": AutoTokenizer.from_pretrained(str(model_folder)), "peft_config": lora}


def unsloth_parts(model_folder: Path, options: dict[str, str]) -> dict[str, Any]:
    """Load and adapt the model with Unsloth."""
    import torch
    from unsloth import FastLanguageModel

    checkpointing = {"0": False, "1": True}.get(options.get("checkpointing", ""), "unsloth")
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(model_folder), max_seq_length=1024, dtype=torch.bfloat16, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model, r=int(options.get("rank", 64)), target_modules=TARGETS, lora_alpha=16, lora_dropout=0, bias="none",
        use_gradient_checkpointing=checkpointing,
    )  # fmt: skip
    return {"model": model, "processing_class": tokenizer}


def settings(system: str, options: dict[str, str]) -> dict[str, Any]:
    """Collect the arguments that both trainers take."""
    import torch

    found: dict[str, Any] = {
        "output_dir": "peer_out",
        "per_device_train_batch_size": int(options["batch_size"]),
        "max_steps": int(options["steps"]),
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": [],
        "learning_rate": 1e-4,
        "max_length": int(options.get("max_length", 1024)),
        "optim": "adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch",
    }
    if system == "trl":
        found |= {"gradient_checkpointing": options.get("checkpointing", "1") == "1"}
        found |= {"use_liger_kernel": options.get("liger") == "1", "optim": options.get("optim", found["optim"])}
        found |= {"packing": options.get("packing") == "1"}
        found |= {"train_sampling_strategy": options["sampler"]} if "sampler" in options else {}
    return found


def timed_trainer(system: str, kind: str, folder: Path, options: dict[str, str], rows: list[dict[str, str]]) -> Any:
    """Make the peer's trainer for these rows."""
    if system == "unsloth":
        import unsloth  # noqa: F401 - patches what is imported after it
    from datasets import Dataset

    parts = (unsloth_parts if system == "unsloth" else trl_parts)(folder / "model", options)
    chosen, data = settings(system, options), Dataset.from_list(rows)
    if kind == "sft":
        from trl import SFTConfig, SFTTrainer

        return SFTTrainer(args=SFTConfig(**chosen), train_dataset=data, **parts)
    from trl import DPOConfig, DPOTrainer

    chosen |= {"precompute_ref_log_probs": options.get("store") == "1"}
    return DPOTrainer(args=DPOConfig(**chosen), train_dataset=data, **parts)


def count_tokens(trainer: Any) -> list[int]:
    """Let a trainer note the real tokens of each batch that its model gets, and return the list that they go to."""
    counts: list[int] = []
    plain = trainer.training_step

    def step(model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        mask = inputs.get("attention_mask")
        counts.append(inputs["input_ids"].numel() if mask is None else int(mask.sum()))
        return plain(model, inputs, *rest, **named)

    trainer.training_step = step
    return counts


def measure(trainer: Any, warm: int) -> tuple[float, float | None]:
    """Train, and return the seconds of the steps after ``warm`` and the peak of all of them in GB."""
    import torch
    from transformers import TrainerCallback

    gpu = torch.cuda.is_available()

    class Clock(TrainerCallback):  # type: ignore[misc]
        started = ended = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if gpu and state.global_step in (warm, state.max_steps):
                torch.cuda.synchronize()
            if state.global_step == warm:
                self.started = time.perf_counter()
            if state.global_step == state.max_steps:
                self.ended = time.perf_counter()

    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    return clock.ended - clock.started, torch.cuda.max_memory_allocated() / 1e9 if gpu else None


def main() -> None:
    """Run one peer and print its line."""
    system, kind, folder = sys.argv[1:4]
    options = {"batch_size": "16", "steps": "12", "warm": "4"} | dict(word.split("=", 1) for word in sys.argv[4:])
    size, steps, warm = (int(options[key]) for key in ("batch_size", "steps", "warm"))
    rows, mean = read_rows(Path(folder), kind, size * steps)
    trainer = timed_trainer(system, kind, Path(folder), options, rows)
    counts = count_tokens(trainer) if mean is None else []
    seconds, peak = measure(trainer, warm)
    samples = size * (steps - warm)
    tokens = sum(counts[warm:]) if mean is None else mean * samples
    line = {"samples_per_second": samples / seconds, "tokens_per_second": tokens / seconds, "peak_memory_gb": peak}
    print("RESULT " + json.dumps(line))


if __name__ == "__main__":
    main()
