"""Train a small model with real weights at every speed, and compare the loss curves with the noise of rounding itself.

    python benchmarks/same_curve.py MODEL_FOLDER ROWS.json --out curve         # one GPU, bf16

ROWS are instruction rows (Alpaca's form). How far two runs of the same mathematics part by rounding alone is measured first: plain
runs that differ only in the size of their micro-batches, so that the same sums are added in another order. Their largest
difference in any step is the noise; a speed passes when its curve stays within twice that of the first plain run. Twice,
because each of the two curves compared has noise of its own, and the largest of few runs is a low estimate of the largest of many.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PLAIN = {"plain": "trainer.speed=plain trainer.micro_batch_tokens=8192"} | {
    f"plain, {tokens}": f"trainer.speed=plain trainer.micro_batch_tokens={tokens}" for tokens in (4096, 2048)
}
SPEEDS = {
    "fast": "trainer.speed=fast trainer.micro_batch_tokens=8192",
    "balanced": "trainer.speed=balanced trainer.micro_batch_tokens=8192",
    "lean": "trainer.speed=lean trainer.micro_batch_tokens=8192",
    "fast, base dense": "trainer.speed=fast trainer.dense_base=true trainer.micro_batch_tokens=8192",
}
JOB = (
    "model=tiny model.chat_template=instruct method=qlora method.rank=16 method.alpha=32 data=instructions data.max_seq_len=512 "
    "data.val_share=0.0 data.max_lost_share=1.0 optim.lr=2e-3 optim.global_batch_size=64 callbacks.preview=null "
    "callbacks.checkpoint=null"
)


def curve(name: str, words: str, args: argparse.Namespace) -> list[dict[str, float]]:
    """Train once and return loss and gradient norm of every step."""
    folder = args.out / name.replace(",", "").replace(" ", "_")
    shutil.rmtree(folder, ignore_errors=True)
    place = folder / "run"
    places = {"model.path": args.model, "data.path": args.rows, "data.cache_dir": folder / "cache", "run_dir": place}
    command = [
        sys.executable, str(HERE.parent / "train.py"), *JOB.split(), *words.split(), f"trainer={args.device}",
        f"trainer.precision={args.precision}", f"trainer.max_steps={args.steps}", *(f"{k}={v}" for k, v in places.items()),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False)
    if done.returncode:
        raise SystemExit(f"{words}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    shutil.rmtree(folder)
    return [{"loss": line["train/loss"], "norm": line["grad_norm"]} for line in lines if "train/loss" in line]


def apart(left: list[dict[str, float]], right: list[dict[str, float]]) -> dict[str, float]:
    """Return the largest and the mean difference of two curves in nats, and the largest of gradient norms as a share."""
    losses = [abs(a["loss"] - b["loss"]) for a, b in zip(left, right, strict=True)]
    norms = [abs(a["norm"] - b["norm"]) / b["norm"] for a, b in zip(left, right, strict=True)]
    return {"largest": max(losses), "mean": sum(losses) / len(losses), "norm": max(norms)}


def main() -> None:
    """Train all of them, print the table, and exit 1 if a speed is further off than the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="gpu", choices=("gpu", "cpu"))
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = PLAIN | SPEEDS
    with ThreadPoolExecutor(args.jobs) as pool:
        found = pool.map(lambda name: curve(name, runs[name], args), runs)
        curves: dict[str, Any] = dict(zip(runs, found, strict=True))
    (args.out / "curves.json").write_text(json.dumps(curves) + "\n", encoding="utf-8")
    noise = max(apart(curves[name], curves["plain"])["largest"] for name in PLAIN if name != "plain")
    failed = False
    print(f"{'run':<18}{'largest':>10}{'mean':>10}{'norm':>9}   nats against plain; bound {2 * noise:.2e}")
    for name in runs:
        off = apart(curves[name], curves["plain"])
        failed |= off["largest"] > 2 * noise
        first, last = curves[name][0]["loss"], curves[name][-1]["loss"]
        line = f"{name:<18}{off['largest']:>10.2e}{off['mean']:>10.2e}{off['norm']:>9.2%}   loss {first:.4f} -> {last:.4f}"
        print(line)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
