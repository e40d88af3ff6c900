"""`evaluate`: check everything, then ask the same of every checkpoint and say which is better."""

from __future__ import annotations

from collections.abc import Sequence

from fine_tune.allocator import let_segments_grow
from fine_tune.cli.verb import run_verb
from fine_tune.evaluation_config import check_evaluation
from fine_tune.evaluation_schema import EVALUATIONS
from fine_tune.threads import wait_politely

USAGE = """usage: fine-tune evaluate ckpt=<checkpoints> [eval=<name>] [key=value ...]

  ckpt=runs/sft                     a run (its final adapter), a checkpoint in one, a PEFT adapter folder, a model
  ckpt=[base,runs/sft,runs/dpo]     several, on identical items; neighbours are compared, and the last with the first
  eval={names}
  eval.path=<file>                  the questions, where the run's own are not meant
  run_dir=<folder>                  where eval/<name>/ is written, instead of the run's folder

In zsh, and with spaces in a name, quote a list: "ckpt=[base,'runs/my run']".
Every setting has a comment in conf/eval/<name>.yaml."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the evaluate verb and return its exit code.

    Args:
        argv: Words after the verb; None takes those of the process.
    """
    return run_verb(argv, USAGE.format(names="|".join(EVALUATIONS)), _evaluate)


def _evaluate(words: list[str]) -> None:
    cfg = check_evaluation(words)
    let_segments_grow()
    wait_politely()
    # The first import of torch, after everything that can be refused without it.
    from fine_tune.evaluating import run_evaluation

    run_evaluation(cfg)
