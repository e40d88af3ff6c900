"""`report`: write report.html of a run, with other runs beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fine_tune.cli.verb import run_verb
from fine_tune.errors import ConfigError
from fine_tune.report.page import write_report
from fine_tune.report.visible import visible

USAGE = """usage: fine-tune report <run> [<run> ...] [out=<file>]

Writes report.html into the folder of the first run; further runs are set beside it, such as the one it started from:
  fine-tune report runs/dpo runs/sft

out=<file> writes elsewhere. The page is one file: it loads nothing from the network and runs no script."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the report verb and return its exit code.

    Args:
        argv: Words after the verb; None takes those of the process.
    """
    return run_verb(argv, USAGE, _report)


def _report(words: list[str]) -> None:
    folders, out = _read(words)
    print(visible(str(write_report(folders[0], out, others=folders[1:]))))


def _read(words: Sequence[str]) -> tuple[list[Path], Path | None]:
    """Part folders from settings."""
    out: Path | None = None
    folders, problems = [], []
    for word in words:
        key, equals, value = word.partition("=")
        if Path(word).is_dir() or not (equals or word.startswith("-")):
            folders.append(Path(word))
        elif key == "out" and value:
            out = Path(value)
        else:
            problems.append(f"{word}: no setting of report. Pass folders of runs, and out=<file> if you like.")
    if out is not None and out.is_dir():
        problems.append(f"out = {out}: is a folder. Pass the name of a file, such as {out / 'report.html'}.")
    if not folders and not problems:
        problems.append("run: no folder. Pass the folder of a run, such as runs/<run_name>.")
    if problems:
        raise ConfigError(problems)
    return folders, out
