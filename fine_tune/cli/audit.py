"""`audit`: what the model will really see of the data, before any weight is loaded."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from fine_tune.cli.verb import run_verb
from fine_tune.cli.words import path, read_beside_config
from fine_tune.report.visible import visible
from fine_tune.threads import wait_politely

USAGE = """usage: fine-tune audit [key=value ...] [rows=<number>] [out=<file>]

Takes the words of `train` and prepares the same rows in the same way, then shows them token by token: what is learned,
what is only read, what was cut; the ledger, the lengths, and checks of masks, stop tokens and prompts.
  fine-tune audit model=llama2_7b data=oasst1
  fine-tune audit objective=dpo model=qwen data=ultrafeedback out=audit.html

rows=<number>   rows of each kind to show (longest, shortest, random, cut, dropped for each reason); 2 by default
out=<file>      also write a page: one file that loads nothing

No weights are loaded or fetched. Exit code 3 if a check fails."""
ROWS = 2


def _rows(value: str) -> int:
    if not (value.isascii() and value.isdigit()):
        raise ValueError("must be a whole number, such as rows=5")
    return int(value)


def _page(value: str) -> Path:
    if not value:
        raise ValueError("must name a file, such as out=audit.html")
    file = path(value)
    if file.is_dir():
        raise ValueError(f"is a folder. Pass the name of a file, such as {file / 'audit.html'}")
    return file


OWN = {"rows": _rows, "out": _page}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the audit verb and return its exit code.

    Args:
        argv: Words after the verb; None takes those of the process.
    """
    return run_verb(argv, USAGE, _audit, needs_words=False)


def _audit(typed: list[str]) -> None:
    own, cfg = read_beside_config(typed, OWN)
    wait_politely()
    # The first import of torch, after everything that can be refused without it.
    import rich

    from fine_tune.audit.audit import audit, refuse
    from fine_tune.audit.page import write_page
    from fine_tune.audit.terminal import show

    found = audit(cfg, number=own.get("rows", ROWS))
    show(found, rich.get_console())
    if page := own.get("out"):
        write_page(found, page, command=f"fine-tune audit {shlex.join(typed)}".rstrip())
        print(visible(f"the page: {page}"), file=sys.stderr)
    refuse(found)
