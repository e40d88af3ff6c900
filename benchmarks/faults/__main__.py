"""The fault scorecard: `python -m benchmarks.faults [--only name,..] [--out folder] [--jobs 2] [--plain]`.

Every fault is injected from outside the process (signals, files, limits, ports, small disks) into a real run on the built-in
world, and so are its two controls: the same without the fault, and the same with the protection taken out. Takes about
20 minutes on two cores; some faults want root (a small file system is mounted).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from benchmarks.faults.catalogue import catalogue, chosen
from benchmarks.faults.judge import Verdict
from benchmarks.faults.nursery import Nursery
from benchmarks.faults.plain_faults import plain_faults
from benchmarks.faults.scorecard import Scorecard, num_scenes, play_all, yes
from benchmarks.faults.workshop import Workshop


def main() -> int:
    """Play, print and write; the exit code tells whether every fault was survived and every control said what it must."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--only", default="", help="names of faults, separated by commas; none: all")
    parser.add_argument("--out", type=Path, default=None, help="folder for scorecard.json, scorecard.md and all scenes")
    parser.add_argument("--jobs", type=int, default=2, help="scenes at a time")
    parser.add_argument("--plain", action="store_true", help="judge a plain lightning-hydra style loop instead")
    asked = parser.parse_args()
    known = plain_faults() if asked.plain else catalogue()
    faults = chosen(known, [name.strip() for name in asked.only.split(",") if name.strip()])
    out = asked.out or Path(tempfile.mkdtemp(prefix="faults-"))
    out.mkdir(parents=True, exist_ok=True)
    name_of_files = "scorecard-plain" if asked.plain else "scorecard"
    scorecard, console = Scorecard(), Console()
    nursery = Nursery()
    try:
        with _bar(console) as bar:
            task = bar.add_task("clean runs", total=num_scenes(faults))
            workshop = Workshop(out / "scenes", nursery)
            workshop.prepare({fault.job.name for _, fault in faults})

            def told(name: str, verdict: Verdict | None) -> None:
                bar.update(task, advance=1, description=name)
                if verdict is not None and not verdict.survived:
                    bar.console.print(Text(f"{name}: {'; '.join(verdict.reasons)}"[:600]))
                scorecard.write(out, name_of_files)

            play_all(workshop, faults, jobs=asked.jobs, told=told, scorecard=scorecard)
    finally:
        nursery.close()
    scorecard.write(out, name_of_files)
    console.print(_table(scorecard))
    console.print("\n".join(f"{key}: {value}" for key, value in scorecard.totals().items()))
    console.print(f"everything is in {out}", soft_wrap=True)
    return 0 if _all_well(scorecard) else 1


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<40.40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def _table(scorecard: Scorecard) -> Table:
    table = Table(title="faults", title_justify="left")
    for name in ("fault", "survived", "lost", "wrong", "exit codes", "clean", "taken out", "noticed", "said"):
        table.add_column(name, overflow="fold")
    for line in scorecard.lines:
        verdict = line.verdict
        if verdict is None:
            table.add_row(line.name, "not played", "", "", "", "", "", "", Text(line.missed))
            continue
        said = verdict.said.splitlines()[-1] if verdict.said else ""
        cells = [
            line.name,
            yes(verdict.survived),
            str(verdict.lost),
            yes(verdict.wrong),
            " ".join(map(str, verdict.codes)),
        ]
        cells += [yes(bool(line.clean)), line.broken, yes(bool(line.noticed))]
        table.add_row(*cells, Text("; ".join(verdict.reasons)[:200] or said[:100]))
    return table


def _all_well(scorecard: Scorecard) -> bool:
    controls = [*scorecard.clean_controls.values(), *scorecard.unharmed.values()]
    lines = [line for line in scorecard.lines if line.verdict is not None]
    return all(line.verdict.survived and line.noticed for line in lines if line.verdict) and all(
        one.survived for one in controls
    )


if __name__ == "__main__":
    sys.exit(main())
