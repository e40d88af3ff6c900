"""One GPU against two: the same steps with the same losses and gradients, and how much faster.

    python benchmarks/workload.py w7b --size 7b --rows 1024
    python benchmarks/two_gpus.py w7b --out two_gpus
    python benchmarks/two_gpus.py tiny --out two_gpus --device cpu --steps 4 --words "optim.global_batch_size=8"

Both runs take the same global batches. Losses and gradient norms are compared over the first steps; gradients by
`fine-tune drill equivalence`, whose two processes each take one GPU, through NCCL (on a CPU: two processes through gloo). Writes
results.json and table.txt; exit code 1 if something is further apart than the bound.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from one_run import number, train

WORDS = (
    "model=llama2_7b method=qlora method.dropout=0.0 data=chat data.max_seq_len=1024 data.val_share=0.0 data.num_eval_items=0 "
    "optim.global_batch_size=64 trainer.micro_batch_tokens=8192 callbacks.preview=null logger=none"
)
# How far losses and gradient norms of the first steps may be apart, relative: half precision's rounding, and float32's.
BOUNDS = {"gpu": {"loss": 5e-3, "grad_norm": 5e-2}, "cpu": {"loss": 1e-5, "grad_norm": 1e-4}}
RANKS = 2


def words_of(folder: Path, out: Path, *, device: str, more: str) -> list[str]:
    """Return the words that all runs share."""
    return [
        *WORDS.split(), f"data.path={folder / 'rows.jsonl'}", f"model.path={folder / 'model'}",
        f"model.chat_template={folder / 'template.jinja'}", f"data.cache_dir={out / 'cache'}", f"trainer={device}",
        *(["model.dtype=float32"] if device == "cpu" else []), *shlex.split(more),
    ]  # fmt: skip


def first_steps(run: Path, count: int) -> list[dict[str, Any]]:
    """Read what a run's first steps were."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "train/loss" in line][:count]


def compare(one: Sequence[dict[str, Any]], two: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the largest relative differences of losses and gradient norms; the rows themselves must be the same."""
    for left, right in zip(one, two, strict=True):
        for key in ("step", "epoch", "samples", "tokens", "supervised_tokens", "learning_rate"):
            if left[key] != right[key]:
                raise SystemExit(f"step {left['step']}: {key} is {left[key]} on one device and {right[key]} on two")
    pairs = {"loss": "train/loss", "grad_norm": "grad_norm"}
    return {
        name: max(abs(a[key] - b[key]) / abs(a[key]) for a, b in zip(one, two, strict=True)) for name, key in pairs.items()
    }


def gradients(words: Sequence[str], out: Path) -> dict[str, Any]:
    """Let the drill compare the gradients of the first steps; return what it says of two processes."""
    shutil.rmtree(out / "drill", ignore_errors=True)
    command = [sys.executable, "-m", "fine_tune", "drill", "equivalence", *words, f"run_dir={out / 'drill'}"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False)
    record = out / "drill" / "drill.json"
    if not record.is_file():
        return {"exit_code": done.returncode, "error": (done.stderr or done.stdout).strip()[-600:]}
    found = json.loads(record.read_text(encoding="utf-8"))["findings"]
    # The last precision is the run's own.
    two = [one for one in found if one["name"].startswith("two processes")][-1]
    return {"exit_code": done.returncode, **{key: two[key] for key in ("name", "gaps", "bounds", "passed", "skipped")}}


def as_table(results: dict[str, Any]) -> str:
    """Lay the results out as text."""
    lines = [f"{'devices':<10}{'tokens/s':>12}{'peak GB':>10}{'first loss':>14}{'last loss':>12}"]
    for name, run in results["runs"].items():
        if run["exit_code"] != 0:
            lines.append(f"{name:<10}  not done (exit code {run['exit_code']}): {run['error'][:200]}")
            continue
        losses = f"{run['first_loss']:>14.6f}{run['last_loss']:>12.6f}"
        lines.append(f"{name:<10}{run['tokens_per_second']:>12,.0f}{number(run['peak_memory_gb']):>10}{losses}")
    if "apart" in results:
        apart, bounds = results["apart"], results["bounds"]
        lines.append(f"two devices are {results['speedup']:.2f} times as fast as one")
        lines += [f"{key}: {apart[key]:.1e} apart over {results['compared_steps']} steps, at most {bounds[key]:g}" for key in apart]
    if "gradients" in results:
        lines.append(f"gradients, by the drill: {json.dumps(results['gradients'])}")
    return "\n".join(lines) + "\n"


def keep(results: dict[str, Any], out: Path) -> None:
    """Write what there is so far."""
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (out / "table.txt").write_text(as_table(results), encoding="utf-8")


def passed(results: dict[str, Any]) -> bool:
    """Tell whether everything was done and is within its bound."""
    near = all(gap <= results["bounds"][key] for key, gap in results.get("apart", {"loss": float("inf")}).items())
    drill = results.get("gradients")
    return near and (drill is None or (drill.get("passed") is True and not drill["skipped"]))


def main() -> int:
    """Run on one device and on two, compare, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what workload.py has made")
    parser.add_argument("--out", type=Path, default=Path("two_gpus"), help="where results go")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu", help="on a CPU: two processes through gloo")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of both runs")
    parser.add_argument("--compared", type=int, default=5, help="first steps whose losses are compared")
    parser.add_argument("--words", default="", help="further words of train.py, such as method=lora")
    parser.add_argument("--no-drill", action="store_true", help="leave the comparison of gradients out")
    asked = parser.parse_args()
    folder, out = asked.folder.absolute(), asked.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    words = words_of(folder, out, device=asked.device, more=asked.words)
    results: dict[str, Any] = {"words": words, "bounds": BOUNDS[asked.device], "runs": {}}
    both = (("one", 1, []), ("two", RANKS, ["trainer.strategy=ddp", f"trainer.devices={RANKS}"]))
    for name, ranks, more in both:
        results["runs"][name] = train([*words, *more, f"trainer.max_steps={asked.steps}"], out / name, timeout=900.0, ranks=ranks)
        keep(results, out)
    if all(run["exit_code"] == 0 for run in results["runs"].values()):
        count = min(asked.compared, asked.steps)
        steps = [first_steps(out / name, count) for name in ("one", "two")]
        speeds = [results["runs"][name]["tokens_per_second"] for name in ("one", "two")]
        results |= {"apart": compare(*steps), "compared_steps": count, "speedup": speeds[1] / speeds[0]}
        keep(results, out)
    if not asked.no_drill:
        results["gradients"] = gradients([*words, "steps=2", "float64=false"], out)
    results["passed"] = passed(results)
    keep(results, out)
    print(as_table(results), end="")
    return 0 if results["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
