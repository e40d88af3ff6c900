"""What speed.py times: jobs of ours through train.py, and peers' jobs on the same rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

OURS, TRL, UNSLOTH = "fine_tune", "TRL", "Unsloth"


@dataclass(frozen=True)
class Case:
    """One timed job.

    Attributes:
        name: What it is called in tables; unique.
        kind: ``sft`` (tokens/s) or ``dpo`` (pairs/s).
        system: Whose code runs it.
        words: Overrides of train.py, or options of peers.py.
    """

    name: str
    kind: str
    system: str
    words: str


SFT = "data=chat data.max_seq_len=1024 optim.global_batch_size=128 trainer.max_steps=10"
DPO = (
    "objective=dpo data=preferences data.max_seq_len=1040 optim.lr=1e-6 optim.global_batch_size=16 trainer.max_steps=24 "
    "trainer.micro_batch_tokens=12288"
)
# Later words win: a larger step in smaller micro-batches.
LEAN = "trainer.speed=lean optim.global_batch_size=32 trainer.micro_batch_tokens=6144"
GPU = (
    Case("ours, auto", "sft", OURS, f"{SFT} method=qlora"),
    Case("ours, fast", "sft", OURS, f"{SFT} method=qlora trainer.speed=fast"),
    Case("ours, lean", "sft", OURS, f"{SFT} method=qlora trainer.speed=lean trainer.micro_batch_tokens=5632"),
    Case("ours, base dense", "sft", OURS, f"{SFT} method=qlora trainer.speed=fast trainer.dense_base=true"),
    Case("ours, bf16 LoRA", "sft", OURS, f"{SFT} method=lora"),
    Case("TRL", "sft", TRL, "batch_size=16 steps=10 warm=3"),
    Case("TRL, Liger, no checkpointing", "sft", TRL, "batch_size=16 steps=10 warm=3 liger=1 checkpointing=0"),
    Case("Unsloth", "sft", UNSLOTH, "batch_size=16 steps=12 warm=4"),
    Case("Unsloth, no checkpointing", "sft", UNSLOTH, "batch_size=26 steps=12 warm=4 checkpointing=0"),
    Case("ours, auto", "dpo", OURS, f"{DPO} method=qlora"),
    Case("ours, lean", "dpo", OURS, f"{DPO} method=qlora {LEAN}"),
    Case("TRL", "dpo", TRL, "batch_size=8 steps=8 warm=3"),
    Case("Unsloth", "dpo", UNSLOTH, "batch_size=8 steps=8 warm=3"),
)  # fmt: skip
CPU_SFT = "data=chat data.max_seq_len=1024 optim.global_batch_size=8 trainer.max_steps=10"
CPU = (
    Case("ours, auto", "sft", OURS, f"{CPU_SFT} method=lora model.dtype=float32"),
    Case("ours, NF4", "sft", OURS, f"{CPU_SFT} method=qlora model.dtype=float32"),
    Case("TRL", "sft", TRL, "batch_size=8 steps=10 warm=4 checkpointing=0"),
)
# For the folder of real_rows.py: the same rows per step, adapter, length and float32; TRL also as its users may set it.
REAL_SFT = (
    "data=chat data.max_seq_len=512 optim.global_batch_size=16 trainer.max_steps=40 method.rank=16 method.alpha=32 "
    "model.dtype=float32"
)
REAL_TRL = "batch_size=16 steps=40 warm=10 checkpointing=0 rank=16 alpha=32 max_length=512"
REAL = (
    Case("ours", "sft", OURS, f"{REAL_SFT} method=lora"),
    Case("TRL", "sft", TRL, REAL_TRL),
    Case("TRL, rows grouped by length", "sft", TRL, f"{REAL_TRL} sampler=group_by_length"),
    Case("TRL, packed", "sft", TRL, f"{REAL_TRL} packing=1 batch_size=7"),
    Case("ours, NF4", "sft", OURS, f"{REAL_SFT} method=qlora"),
    Case("TRL, NF4", "sft", TRL, f"{REAL_TRL} base=nf4"),
)
CASES = {"gpu": GPU, "cpu": CPU, "real": REAL}


def chosen(cases: str, wanted: str | None, skipped: str | None = None) -> Iterator[Case]:
    """Yield the cases whose kind and name contain one of the comma-separated words of ``wanted``, and none of ``skipped``."""
    for case in CASES[cases]:
        label = f"{case.kind} {case.system} {case.name}".lower()
        if skipped is not None and any(word in label for word in skipped.lower().split(",")):
            continue
        if wanted is None or any(all(part in label for part in word.lower().split("+")) for word in wanted.split(",")):
            yield case
