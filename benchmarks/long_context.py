"""Train on sequences of 8k, 16k and 32k tokens through train.py: memory and speed by length.

    python benchmarks/workload.py w7b32k --size 7b --rows 1 --positions 32768
    python benchmarks/long_context.py w7b32k --out long_context
    python benchmarks/long_context.py w7b32k --out long_context --runs lean:8192,lean:16384,lean:32768

One sequence per forward pass, two per optimizer step, every word after the prompt learned. Writes results.json, table.txt and
long_context.svg. Memory grows linearly where each added token costs the same; the table has the cost between one length and
the next.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path
from typing import Any

from one_run import number, train, write
from workload import _words

WORDS = (
    "model=llama2_7b method=qlora data=chat data.val_share=0.0 optim.global_batch_size=2 callbacks.preview=null"
)
RUNS = "lean:8192,lean:16384,lean:32768,balanced:8192,balanced:16384"
PROMPT = 64


def write_rows(file: Path, tokens: int, count: int) -> None:
    """Write rows of exactly so many tokens, the first and the last one of the template's."""
    rng = random.Random(tokens)
    sizes = (("user", PROMPT), ("assistant", tokens - PROMPT - 2))
    rows = [{"messages": [{"role": role, "content": _words(rng, size)} for role, size in sizes]} for _ in range(count)]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def run(folder: Path, speed: str, tokens: int, out: Path, *, device: str, steps: int) -> dict[str, Any]:
    """Train on one length at one speed."""
    rows = out / f"rows_{tokens}.jsonl"
    write_rows(rows, tokens, 8)
    words = [
        *WORDS.split(), f"trainer={device}", f"trainer.max_steps={steps}", f"trainer.speed={speed}",
        f"data.max_seq_len={tokens}", f"data.path={rows}",
        f"model.path={folder / 'model'}", f"model.chat_template={folder / 'template.jinja'}", f"data.cache_dir={out / 'cache'}",
        *(["model.dtype=float32"] if device == "cpu" else []),
    ]  # fmt: skip
    return {"speed_asked": speed, "tokens": tokens, **train(words, out / "run")}


def with_costs(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each run what a token more costs since the next shorter one of its speed, in MB (1e6 bytes)."""
    for row in results:
        shorter = [
            one for one in results
            if one["speed_asked"] == row["speed_asked"] and one["tokens"] < row["tokens"] and one.get("peak_memory_gb")
        ]  # fmt: skip
        before = max(shorter, key=lambda one: one["tokens"], default=None)
        if before is not None and row.get("peak_memory_gb"):
            row["mb_per_token"] = 1e3 * (row["peak_memory_gb"] - before["peak_memory_gb"]) / (row["tokens"] - before["tokens"])
    return results


def as_table(results: list[dict[str, Any]]) -> str:
    """Lay the results out as text."""
    lines = [f"{'speed':<10}{'tokens':>8}{'peak GB':>9}{'reserved':>10}{'MB a token':>12}{'tokens/s':>10}{'MFU':>8}"]
    for row in results:
        if row["exit_code"] != 0:
            what = f"not done (exit code {row['exit_code']}): {row['error'][:100]}"
            lines.append(f"{row['speed_asked']:<10}{row['tokens']:>8,}  {what}")
            continue
        sizes = f"{number(row['peak_memory_gb']):>9}{number(row['reserved_memory_gb']):>10}"
        sizes += f"{number(row.get('mb_per_token'), '.3f'):>12}"
        speed = f"{row['tokens_per_second']:>10,.0f}{number(row['mfu'], '.1%'):>8}"
        lines.append(f"{row['speed_asked']:<10}{row['tokens']:>8,}{sizes}{speed}")
    return "\n".join(lines) + "\n"


def draw(results: list[dict[str, Any]], file: Path) -> None:
    """Draw peak memory against length, a line for each speed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    done = [row for row in results if row.get("peak_memory_gb")]
    if not done:
        return  # a CPU has no such peak
    figure, panel = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    for speed, color in zip(dict.fromkeys(row["speed_asked"] for row in done), ("#1f6feb", "#9a6700", "#57606a"), strict=False):
        points = sorted((row["tokens"], row["peak_memory_gb"]) for row in done if row["speed_asked"] == speed)
        panel.plot(*zip(*points, strict=True), marker="o", color=color, label=f"speed={speed}")
        for tokens, peak in points:
            panel.annotate(f"{peak:.1f}", (tokens, peak), textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8)
    lengths = sorted({row["tokens"] for row in done})
    panel.set_xticks(lengths, [f"{tokens:,}" for tokens in lengths])
    panel.set_xlabel("tokens of a sequence")
    panel.set_ylabel("peak memory, GB")
    panel.set_xlim(0)
    panel.set_ylim(0, 1.15 * max(row["peak_memory_gb"] for row in done))
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=9)
    figure.savefig(file)


def main() -> None:
    """Run every length and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what workload.py wrote with --positions")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", default=RUNS, help="speed:tokens, several with commas")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--redraw", action="store_true", help="only draw what results.json in --out holds")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    if args.redraw:
        results = json.loads((args.out / "results.json").read_text(encoding="utf-8"))["results"]
    for word in [] if args.redraw else args.runs.split(","):
        speed, _, tokens = word.partition(":")
        print(f"{speed}, {tokens} tokens ...", flush=True)
        results.append(run(args.folder, speed, int(tokens), args.out, device=args.device, steps=args.steps))
        write(with_costs(results), as_table(results), args.out)
    shutil.rmtree(args.out / "run", ignore_errors=True)
    print(as_table(results), end="")
    try:
        draw(results, args.out / "long_context.svg")
    except ImportError:
        print("no picture: matplotlib is not installed here; --redraw makes it elsewhere")


if __name__ == "__main__":
    main()
