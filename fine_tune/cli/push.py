"""`push`: an adapter or a merged model goes to the hub, with a card."""

from __future__ import annotations

from collections.abc import Sequence

from fine_tune.cli.verb import run_verb
from fine_tune.cli.words import flag, one_of, path, read_words, text
from fine_tune.report.visible import visible
from fine_tune.threads import wait_politely

USAGE = """usage: fine-tune push ckpt=<run> repo=<owner>/<name> [key=value ...]

  what=adapter|merged     the run's adapter (default), or the model that `fine-tune merge` made of it
  merged=<folder>         where that is; <run>/merged by default
  dry_run=true            write the folder that would be pushed, list it, and stop
  out=<folder>            where it is written; <run>/push/<what> by default
  licence=<name>          the hub's name of the base's licence, where the base's files do not tell
  private=true|false      of a new repository; true by default

The folder holds the weights, tokenizer, chat template, passport and a card; nothing else of the run, and no secret. The hub's
token comes from `hf auth login` or HF_TOKEN."""

READERS = {
    "ckpt": path,
    "repo": text,
    "what": one_of("adapter", "merged"),
    "merged": path,
    "out": path,
    "licence": text,
    "dry_run": flag,
    "private": flag,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the push verb and return its exit code.

    Args:
        argv: Words after the verb; None takes those of the process.
    """
    return run_verb(argv, USAGE, _push)


def _push(words: list[str]) -> None:
    values = read_words(words, READERS, needed=["ckpt", "repo"]).values
    wait_politely()
    from fine_tune.pushing.push import PushSettings, push

    files, address = push(PushSettings(**values))
    for file in files:
        print(visible(f"{file.stat().st_size:>14,}  {file.name}"))
    where = f"pushed to {address}" if address else "not pushed: this was a dry run"
    print(visible(f"{where}; the folder is {files[0].parent}"))
