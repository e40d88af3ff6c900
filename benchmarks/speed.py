"""Time training through train.py beside TRL and Unsloth, on the same model and rows; one process each, one after the other.

    python benchmarks/workload.py w7b --size 7b --rows 1024
    python benchmarks/speed.py w7b --out speed                    # one GPU, everything that is installed
    python benchmarks/speed.py w7b --out speed --only sft+fine_tune,sft+trl

    python benchmarks/workload.py small --size small --rows 256   # the same on a CPU, in minutes
    python benchmarks/speed.py small --out speed --device cpu

    python benchmarks/real_rows.py story --model stories260K --rows alpaca.json     # real weights and rows, on a CPU
    python benchmarks/speed.py story --out speed --device cpu --real

Writes results.json, table.txt and speed.svg. Speeds count real tokens (nothing of padding) and the second half of ours' steps,
the steps after warm-up of the peers'; what train.py does besides training (callbacks, metrics, data loading) is in ours.
Peaks are allocated memory of the whole run. A peer that is not installed is listed with its error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cases import OURS, Case, chosen

HERE = Path(__file__).resolve().parent
COMMON = (
    "model=llama2_7b method.rank=64 method.alpha=16 trainer.num_workers=2 callbacks.preview=null callbacks.checkpoint=null "
    "data.val_share=0.0"
)
MEMORY = ("peak_memory_gb", "reserved_memory_gb")


def run_ours(case: Case, folder: Path, device: str, scratch: Path) -> dict[str, Any]:
    """Run train.py as a user does and read what it left."""
    place = scratch / "run"
    shutil.rmtree(place, ignore_errors=True)
    rows = "rows.jsonl" if case.kind == "sft" else "pairs.jsonl"
    places = {
        "model.path": folder / "model",
        "model.chat_template": folder / "template.jinja",
        "data.path": folder / rows,
        "data.cache_dir": folder / "cache",
        "run_dir": place,
    }
    words = [*COMMON.split(), f"trainer={device}", *case.words.split(), *(f"{key}={value}" for key, value in places.items())]
    _run([sys.executable, str(HERE.parent / "train.py"), *words])
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    late = steps[len(steps) // 2 :]
    seconds = sum(line["step_seconds"] for line in late)
    summary = json.loads((place / "summary.json").read_text(encoding="utf-8"))
    return {
        "tokens_per_second": sum(line["tokens"] for line in late) / seconds,
        "samples_per_second": sum(line["samples"] for line in late) / seconds,
        **{key: summary[key] for key in (*MEMORY, "device")},
        "first_step_seconds": steps[0]["step_seconds"],
        "first_loss": steps[0]["train/loss"],
    }


def run_peer(case: Case, folder: Path) -> dict[str, Any]:
    """Run peers.py and read its line."""
    words = [case.system.lower(), case.kind, str(folder), *case.words.split()]
    text = _run([sys.executable, str(HERE / "peers.py"), *words])
    line = next(line for line in reversed(text.splitlines()) if line.startswith("RESULT "))
    return dict(json.loads(line.removeprefix("RESULT ")))


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, timeout=900, check=False
    )
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise RuntimeError(said[-1][:300] if said else f"exit code {done.returncode}")
    return done.stdout


def time_case(case: Case, folder: Path, device: str, scratch: Path) -> dict[str, Any]:
    """Time one case; what went wrong is part of the result."""
    started = time.perf_counter()
    try:
        found = run_ours(case, folder, device, scratch) if case.system == OURS else run_peer(case, folder)
    except (RuntimeError, OSError, StopIteration, subprocess.TimeoutExpired) as error:
        found = {"error": str(error)}
    return {**asdict(case), **found, "wall_seconds": time.perf_counter() - started}


def as_table(results: list[dict[str, Any]]) -> str:
    """Lay the results out as text, fastest first within each kind."""
    lines = [f"{'job':<6}{'system':<34}{'tokens/s':>10}{'samples/s':>11}{'peak GB':>9}{'reserved':>10}"]
    for row in sorted(results, key=lambda r: (r["kind"] != "sft", -r.get("samples_per_second", 0.0))):
        if "error" in row:
            lines.append(f"{row['kind']:<6}{row['name']:<34}not run: {row['error'][:60]}")
            continue
        peak, reserved = ("-" if row.get(key) is None else f"{row[key]:.2f}" for key in MEMORY)
        speed = f"{row['tokens_per_second']:>10,.0f}{row['samples_per_second']:>11.2f}"
        lines.append(f"{row['kind']:<6}{row['name']:<34}{speed}{peak:>9}{reserved:>10}")
    return "\n".join(lines) + "\n"


def draw(results: list[dict[str, Any]], file: Path) -> None:
    """Draw samples per second as bars, a panel for each kind, with the peak memory beside the bar."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    done = [row for row in results if "error" not in row]
    kinds = list(dict.fromkeys(row["kind"] for row in done))
    sizes = [sum(row["kind"] == kind for row in done) for kind in kinds]
    figure, panels = plt.subplots(
        len(kinds), 1, figsize=(8, 0.9 * len(kinds) + 0.38 * sum(sizes)), squeeze=False, height_ratios=sizes, layout="constrained"
    )
    for panel, kind in zip(panels[:, 0], kinds, strict=True):
        rows = sorted((row for row in done if row["kind"] == kind), key=lambda row: row["samples_per_second"])
        unit, key = ("real tokens/s", "tokens_per_second") if kind == "sft" else ("pairs/s", "samples_per_second")
        bars = panel.barh(
            [row["name"] for row in rows], [row[key] for row in rows],
            color=["#1f6feb" if row["system"] == OURS else "#9aa4b2" for row in rows],
        )  # fmt: skip
        notes = [
            f" {row[key]:,.{0 if kind == 'sft' else 1}f}"
            + (f"  at {row['peak_memory_gb']:.1f} GB" if row.get("peak_memory_gb") else "")
            for row in rows
        ]
        panel.bar_label(bars, notes, fontsize=8)
        panel.set_title(f"{kind.upper()}: {unit}", loc="left", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlim(0, max(row[key] for row in rows) * 1.28)
        panel.tick_params(labelsize=8)
    figure.savefig(file)


def main() -> None:
    """Time the chosen cases and write the results after each, so that nothing is lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what workload.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--real", action="store_true", help="FOLDER is real_rows.py's")
    parser.add_argument("--skip", help="words that no case may have, with commas")
    parser.add_argument("--only", help="words that a case must have, as sft+trl; several with commas")
    parser.add_argument("--redraw", action="store_true", help="only draw what results.json in --out holds")
    args = parser.parse_args()
    if args.redraw:
        draw(json.loads((args.out / "results.json").read_text(encoding="utf-8"))["results"], args.out / "speed.svg")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    cases, results = list(chosen("real" if args.real else args.device, args.only, args.skip)), []
    for number, case in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}] {case.kind}: {case.name} ...", flush=True)
        results.append(time_case(case, args.folder, args.device, args.out))
        record = {"machine": platform.processor() or platform.machine(), "python": platform.python_version(), "results": results}
        (args.out / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (args.out / "table.txt").write_text(as_table(results), encoding="utf-8")
    shutil.rmtree(args.out / "run", ignore_errors=True)
    print(as_table(results), end="")
    if any("error" not in row for row in results):
        try:
            draw(results, args.out / "speed.svg")
        except ImportError:
            print("no picture: matplotlib is not installed here; --redraw makes it elsewhere")


if __name__ == "__main__":
    main()
