"""A whole sweep: its jobs one after another or shared between processes, its board, and its exit code."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence

import rich

from fine_tune.board.board import make_board
from fine_tune.board.terminal import say as show_board
from fine_tune.errors import FineTuneError
from fine_tune.kept import Kept
from fine_tune.opening import say
from fine_tune.report.visible import visible
from fine_tune.sweeps.jobs import do_job
from fine_tune.sweeps.record import FAILED, JobRecord, SweepFolder
from fine_tune.sweeps.spec import SEARCH, SweepSpec

# Of a reason in a line; all of it is in the board.
REASON_CHARACTERS = 400
# Between two looks at jobs that other processes have.
LOOK_SECONDS = 1.0
# What the jobs of one process share: in a launcher's processes there is no other place that lasts from job to job.
KEPT = Kept()


def open_sweep(spec: SweepSpec, command: Sequence[str]) -> SweepFolder:
    """Make the sweep's folder and write what it is."""
    sweep = SweepFolder(spec.folder)
    settings = spec.settings or {}
    sweep.describe(
        {
            "command": shlex.join(command),
            "kind": spec.kind,
            "metric": settings.get("metric"),
            "direction": settings.get("direction"),
            "num_jobs": settings["num_trials"] if spec.kind == SEARCH else len(spec.jobs),
            "swept": [one.key for one in spec.varied],
        }
    )
    return sweep


def run_grid(spec: SweepSpec, sweep: SweepFolder, *, rank: int) -> None:
    """Run every job that is not done; the first process also waits for those of the others, and takes over what they drop."""
    numbers = range(len(spec.jobs))
    while True:
        ended = [grid_job(spec, sweep, number) for number in numbers if not sweep.is_done(number)]
        if rank > 0 or all(sweep.is_done(number) for number in numbers):
            return
        if not any(ended):
            time.sleep(LOOK_SECONDS)


def grid_job(spec: SweepSpec, sweep: SweepFolder, number: int) -> JobRecord | None:
    """Run one job of a grid in this process."""
    words, keys = spec.jobs[number], {one.key for one in spec.varied}
    shown = " ".join(word for word in words if word.partition("=")[0].lstrip("+") in keys)
    return do_job(sweep, number, words, kept=KEPT, title=f"job {number + 1} of {len(spec.jobs)}: {shown}")


def finish(spec: SweepSpec, sweep: SweepFolder) -> int:
    """Show the board and return the exit code: that of the first job that failed, 0 if none did."""
    try:
        board = make_board(spec.folder, out=spec.folder)
    except FineTuneError as error:
        say(f"no board: {error}")
    else:
        show_board(board, rich.get_console())
    failed = [record for record in sweep.records() if record.status == FAILED]
    for record in failed:
        reason = " ".join((record.reason or "").split())[:REASON_CHARACTERS]
        line = f"job {record.number + 1} failed with exit code {record.exit_code} ({record.error}): {reason}"
        print(visible(line), file=sys.stderr)
    return failed[0].exit_code if failed else 0
