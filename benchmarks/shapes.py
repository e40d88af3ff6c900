"""Compare families of models: hardware use against LLaMA-2-7B's, and what a large vocabulary takes beyond its weights.

    python benchmarks/workload.py w7b --size 7b --rows 1024
    python benchmarks/workload.py wllama3 --size llama3_8b --rows 1
    python benchmarks/workload.py wllama3_32k --size llama3_8b --rows 1 --vocabulary 32000
    python benchmarks/shapes.py 7b=w7b llama3_8b=wllama3 llama3_8b_32k=wllama3_32k --out shapes --rows w7b

All train on the rows of --rows with the same words. Results of several calls with one --out are put together, so that checkpoints
need not lie beside each other. A name that ends in _32k is the same model with 32,000 words: the difference of their peaks, less
that of their weights, is what the vocabulary takes. MFU counts no recomputation and is that of the second half of the steps.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from one_run import number, train, write

WORDS = (
    "model=llama2_7b method=qlora method.rank=64 method.alpha=16 data=chat data.max_seq_len=1024 data.val_share=0.0 "
    "optim.global_batch_size=64 trainer.max_steps=10 callbacks.preview=null"
)
GPU = "trainer=gpu trainer.speed=balanced trainer.micro_batch_tokens=8192"
CPU = "trainer=cpu model.dtype=float32 trainer.max_steps=2 optim.global_batch_size=4"
REFERENCE, SMALL = "7b", "_32k"
# Bytes of a weight of embeddings and head, which are not quantised.
HALF = 2


def beyond_weights(results: dict[str, dict[str, Any]], name: str) -> float | None:
    """Return the GB that a vocabulary takes beyond its weights; None without the run with 32,000 words."""
    pair = [results.get(one, {}) for one in (name, name + SMALL)]
    if any(one.get("peak_memory_gb") is None for one in pair):
        return None
    peaks, weights = ([one[key] for one in pair] for key in ("peak_memory_gb", "total_parameters"))
    return float(peaks[0] - peaks[1] - HALF * (weights[0] - weights[1]) / 1e9)


def as_table(results: dict[str, dict[str, Any]]) -> str:
    """Lay the results out as text."""
    lines = [f"{'shape':<18}{'tokens/s':>10}{'MFU':>8}{'of 7b':>8}{'peak GB':>9}{'reserved':>10}{'vocabulary, GB':>16}"]
    base = results.get(REFERENCE, {}).get("mfu")
    for name, row in results.items():
        if row["exit_code"] != 0:
            lines.append(f"{name:<18}not done (exit code {row['exit_code']}): {row['error'][:120]}")
            continue
        share = row["mfu"] / base if base and row["mfu"] else None
        cells = (number(row["mfu"], ".1%"), number(share, ".1%"), number(row["peak_memory_gb"]), number(row["reserved_memory_gb"]))
        sizes = "".join(f"{cell:>{width}}" for cell, width in zip(cells, (8, 8, 9, 10), strict=True))
        lines.append(f"{name:<18}{row['tokens_per_second']:>10,.0f}{sizes}{number(beyond_weights(results, name)):>16}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run each shape and put the results with earlier ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="name=folder, what workload.py wrote")
    parser.add_argument("--rows", type=Path, required=True, help="folder of workload.py whose rows and template are used")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cpu", action="store_true", help="try the script with tiny checkpoints")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    earlier = args.out / "results.json"
    known = json.loads(earlier.read_text(encoding="utf-8"))["results"] if earlier.is_file() else []
    results = {row["name"]: row for row in known}
    for word in args.checkpoints:
        name, folder = word.split("=", 1)
        print(f"{name} ...", flush=True)
        places = (
            f"model.path={Path(folder) / 'model'}", f"model.chat_template={args.rows / 'template.jinja'}",
            f"data.path={args.rows / 'rows.jsonl'}", f"data.cache_dir={args.out / 'cache'}",
        )  # fmt: skip
        results[name] = {"name": name, **train([*WORDS.split(), *(CPU if args.cpu else GPU).split(), *places], args.out / "run")}
        write(list(results.values()), as_table(results), args.out)
    shutil.rmtree(args.out / "run", ignore_errors=True)
    print(as_table(results), end="")


if __name__ == "__main__":
    main()
