"""`audit`: what the model will really see of the data, before any weight is loaded."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fine_tune.cli.verb import run_verb
from fine_tune.config import check_config
from fine_tune.errors import ConfigError
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


@dataclass
class Words:
    """The words of an audit: its own, and those of the config."""

    rows: int = 2
    out: Path | None = None
    overrides: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the audit verb and return its exit code.

    Args:
        argv: Words after the verb; None takes those of the process.
    """
    return run_verb(argv, USAGE, _audit, needs_words=False)


def _audit(typed: list[str]) -> None:
    words, cfg = _read(typed)
    wait_politely()
    # The first import of torch, after everything that can be refused without it.
    import rich

    from fine_tune.audit.audit import audit, refuse
    from fine_tune.audit.page import write_page
    from fine_tune.audit.terminal import show

    found = audit(cfg, number=words.rows)
    show(found, rich.get_console())
    if words.out is not None:
        write_page(found, words.out, command=" ".join(["fine-tune audit", *typed]))
        print(visible(f"the page: {words.out}"), file=sys.stderr)
    refuse(found)


def _read(typed: Sequence[str]) -> tuple[Words, dict[str, object]]:
    """Part the words, and check all of them before any is acted on."""
    words, problems = Words(), []
    for word in typed:
        key, _, value = word.partition("=")
        if key == "out" and value:
            words.out = Path(value).expanduser()
        elif key == "rows" and value.isascii() and value.isdigit():
            words.rows = int(value)
        elif key in ("out", "rows"):
            problems.append(f"{word}: pass rows=<whole number> and out=<file>, such as rows=5 out=audit.html.")
        else:
            words.overrides.append(word)
    if words.out is not None and words.out.is_dir():
        problems.append(f"out = {words.out}: is a folder. Pass the name of a file, such as {words.out / 'audit.html'}.")
    try:
        cfg = check_config(words.overrides).cfg
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    if problems:
        raise ConfigError(problems)
    return words, cfg
