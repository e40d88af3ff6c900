"""`chat`: talk to a checkpoint in the terminal, or to two of them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fine_tune.chat.rows_file import RowsFile
from fine_tune.chat_config import check_chat
from fine_tune.cli.verb import run_verb
from fine_tune.threads import wait_politely

USAGE = """usage: fine-tune chat ckpt=<checkpoint> [key=value ...]

  ckpt=runs/sft                     a run (its final adapter), a checkpoint in one, a PEFT adapter folder, a model
  ckpt=[base,runs/sft]              two answer side by side, and a key says which is better
  save=pairs.jsonl                  preferences are added to this file, which trains: data=preferences data.path=pairs.jsonl
  system="'You are brief.'"         the conversation begins with a system turn
  temperature=0.7 top_p=0.9         sampled instead of greedy; seed= decides what
  max_new_tokens=512                most tokens of an answer

In zsh, and with spaces in a name, quote a list: "ckpt=[base,'runs/my run']". /help in the chat shows its commands.
Every setting has a comment in conf/chat.yaml."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chat verb and return its exit code.

    Args:
        argv: Words after the verb; None takes those of the process.
    """
    return run_verb(argv, USAGE, _chat)


def _chat(words: list[str]) -> None:
    cfg = check_chat(words)
    pairs = RowsFile(Path(cfg["save"]).expanduser(), "pair") if cfg["save"] else None
    wait_politely()
    # The first import of torch, after everything that can be refused without it.
    from fine_tune.chat.start import run_chat

    run_chat(cfg, pairs)
