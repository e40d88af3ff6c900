"""Run the studies' settings under the memory of their cards, through train.py, on random checkpoints of the right shape.

    python benchmarks/workload.py w7b --size 7b --rows 1
    python benchmarks/workload.py wmistral --size mistral_7b --rows 1
    python benchmarks/workload.py wphi2 --size phi2 --rows 1
    python benchmarks/small_cards.py 7b=w7b mistral_7b=wmistral phi2=wphi2 --out small_cards
    python benchmarks/small_cards.py 7b=w7b --out small_cards --only qlora,lora  # some; jobs without a checkpoint are left out

Every hyper-parameter is the experiment's own; rows are made in the form of the study's data. Left out to save time: checkpoints,
all but eight steps, and all but a few held-out questions and preview tokens. A limit is the allocator's: a run that needs more
ends with exit code 7. Paged optimizer state counts against it. On a CPU (--cpu, with sizes tiny, tiny_mistral, tiny_phi2)
only the script itself is tried.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from one_run import number, train, write
from workload import _length, _words

STEPS = 8
SHORT = (
    f"trainer.max_steps={STEPS}", "data.val_share=0.02", "data.num_eval_items=0", "data.max_lost_share=1.0",
    "data.max_new_tokens=16", "callbacks.preview.max_new_tokens=16",
)  # fmt: skip
# A study's card is left behind: everything that this one has, in the study's own precision.
FULL_SPEED = "trainer=gpu trainer.precision=16-mixed"
# What is recomputed is planned within the limit; the experiments recompute everything, as the study did.
QLORA, LORA = (f"experiment=llama2_oasst1_{method} trainer.recompute=null" for method in ("qlora", "lora"))


@dataclass(frozen=True)
class Job:
    """One run: a key for --only, its name, the checkpoint's size, how its rows are written, its words, and its limit in GB."""

    key: str
    name: str
    size: str
    rows: str
    words: str
    limit: float | None = None


JOBS = (
    Job("guanaco", "guanaco study, T4", "7b", "inst", "experiment=llama2_chat_guanaco1k", 15),
    Job("phi2", "phi2 study, T4", "phi2", "trees", "experiment=phi2_oasst1", 15),
    Job("mistral", "mistral study, RTX 3060", "mistral_7b", "instructions", "experiment=mistral_instruct", 12),
    Job("qlora", "oasst1 study, QLoRA", "7b", "trees", f"{QLORA} trainer.memory_limit_gb=8", 8),
    Job("lora", "oasst1 study, LoRA", "7b", "trees", f"{LORA} trainer.memory_limit_gb=16", 16),
    Job("qlora_full", "oasst1 study, QLoRA, full speed", "7b", "trees", QLORA),
    Job("lora_full", "oasst1 study, LoRA, full speed", "7b", "trees", LORA),
    Job("guanaco_full", "guanaco study, full speed", "7b", "inst", f"experiment=llama2_chat_guanaco1k {FULL_SPEED}"),
    Job("phi2_full", "phi2 study, full speed", "phi2", "trees", f"experiment=phi2_oasst1 {FULL_SPEED}"),
    Job("mistral_full", "mistral study, full speed", "mistral_7b", "instructions", f"experiment=mistral_instruct {FULL_SPEED}"),
)


def _turns(rng: random.Random) -> tuple[str, str]:
    prompt = _length(rng, median=60, spread=1.0, low=8, high=500)
    return _words(rng, prompt), _words(rng, _length(rng, median=180, spread=0.8, low=16, high=1000 - prompt))


def inst_row(rng: random.Random, number: int) -> list[dict[str, Any]]:
    """LLaMA-2's form in one text."""
    prompt, answer = _turns(rng)
    return [{"text": f"<s>[INST] {prompt} [/INST] {answer} </s>"}]


def instructions_row(rng: random.Random, number: int) -> list[dict[str, Any]]:
    """Instruction, context and response."""
    prompt, answer = _turns(rng)
    return [{"instruction": prompt, "context": _words(rng, 40), "response": answer[: len(answer) * 3 // 4]}]


def trees_row(rng: random.Random, number: int) -> list[dict[str, Any]]:
    """Two exchanges of a tree of messages."""
    found: list[dict[str, Any]] = []
    shared = {"lang": "en", "deleted": False, "message_tree_id": f"t{number}", "synthetic": False}
    for exchange in range(2):
        for role, text in zip(("prompter", "assistant"), _turns(rng), strict=True):
            parent = found[-1]["message_id"] if found else None
            rank = 0 if role == "assistant" else None
            name = f"{role[0]}{number}.{exchange}"
            found.append({"message_id": name, "parent_id": parent, "role": role, "text": text, "rank": rank, **shared})
    return found


ROWS: dict[str, Callable[[random.Random, int], list[dict[str, Any]]]] = {
    "inst": inst_row,
    "instructions": instructions_row,
    "trees": trees_row,
}


def write_rows(file: Path, kind: str, count: int) -> None:
    """Write rows in a study's form."""
    rng = random.Random(0)
    rows = [row for number in range(count) for row in ROWS[kind](rng, number)]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def run(job: Job, checkpoint: Path, out: Path, *, cpu: bool) -> dict[str, Any]:
    """Run one job and tell whether it kept its limit."""
    rows = out / f"{job.rows}.jsonl"
    write_rows(rows, job.rows, 40 if cpu else 400)
    places = (f"model.path={checkpoint / 'model'}", f"data.path={rows}", f"data.cache_dir={out / 'cache'}")
    there = ("trainer=cpu", "trainer.max_steps=2", "model.dtype=float32", "trainer.memory_limit_gb=null") if cpu else ()
    found = train([*job.words.split(), *SHORT, *places, *there], out / "run")
    used = found.get("peak_memory_gb")
    total = None if used is None else used + (found.get("host_paged_gb") or 0.0)
    kept = None if job.limit is None or total is None else bool(total <= job.limit)
    return {**asdict(job), **found, "counted_gb": total, "kept_limit": False if found["exit_code"] else kept}


def as_table(results: list[dict[str, Any]]) -> str:
    """Lay the results out as text."""
    heads = ("limit", "peak", "paged", "reserved", "tokens/s", "MFU", "tokens")
    lines = [f"{'run':<34}" + "".join(f"{head:>10}" for head in heads) + "  speed, kept?"]
    for row in results:
        if row["exit_code"] != 0:
            lines.append(f"{row['name']:<34}not done (exit code {row['exit_code']}): {row['error'][:120]}")
            continue
        figures = [row["limit"], row["peak_memory_gb"], row["host_paged_gb"], row["reserved_memory_gb"]]
        cells = [number(value) for value in figures] + [number(row["tokens_per_second"], ",.0f")]
        cells += [number(row["mfu"], ".1%"), number(row["micro_batch_tokens"], ",d")]
        kept = {True: "yes", False: "NO", None: "-"}[row["kept_limit"]]
        lines.append(f"{row['name']:<34}" + "".join(f"{cell:>10}" for cell in cells) + f"  {row['speed']}, {kept}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the chosen jobs, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="size=folder, what workload.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", help=f"some of {', '.join(job.key for job in JOBS)}, with commas")
    parser.add_argument("--cpu", action="store_true", help="try the script with tiny checkpoints")
    args = parser.parse_args()
    folders = dict(word.split("=", 1) for word in args.checkpoints)
    if args.cpu:
        tiny = {"7b": "tiny", "mistral_7b": "tiny_mistral", "phi2": "tiny_phi2"}
        folders = {size: folders[name] for size, name in tiny.items() if name in folders}
    wanted = args.only.split(",") if args.only else [job.key for job in JOBS]
    args.out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for job in JOBS:
        if folders.get(job.size) and job.key in wanted:
            print(f"{job.name} ...", flush=True)
            results.append(run(job, Path(folders[job.size]), args.out, cpu=args.cpu))
            write(results, as_table(results), args.out)
            print(as_table(results).splitlines()[-1], flush=True)
    shutil.rmtree(args.out / "run", ignore_errors=True)
    print(as_table(results), end="")


if __name__ == "__main__":
    main()
