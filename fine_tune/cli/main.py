"""The console script `fine-tune`: one verb per module of this folder."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from fine_tune.cli.verb import tell_stopped

# verb -> module with `main(argv) -> exit code`, and what it does.
VERBS = {
    "train": ("fine_tune.cli.train", "fine-tune a model: fine-tune train model=llama2_7b data=oasst1"),
    "evaluate": ("fine_tune.cli.evaluate", "ask checkpoints: fine-tune evaluate ckpt=[base,runs/sft] eval=exact_match"),
    "report": ("fine_tune.cli.report", "one page of a run or of several: fine-tune report runs/sft runs/dpo"),
    "board": ("fine_tune.cli.board", "runs ranked in one table and on one page: fine-tune board runs"),
    "study": ("fine_tune.cli.study", "runs compared, asked and reported: fine-tune study side_by_side ckpt=[base,runs/sft]"),
    "chat": ("fine_tune.cli.chat", "talk to a checkpoint, or to two side by side: fine-tune chat ckpt=[base,runs/sft]"),
    "audit": ("fine_tune.cli.audit", "what the model will see of its data: fine-tune audit model=llama2_7b data=oasst1"),
    "plan": ("fine_tune.cli.plan", "what a run will take of its device: fine-tune plan model=llama2_7b method=qlora data=oasst1"),
    "doctor": ("fine_tune.cli.doctor", "can this machine do what runs need: fine-tune doctor"),
    "drill": ("fine_tune.cli.drill", "promises tried on your own config: fine-tune drill resume model=llama2_7b data=oasst1"),
    "merge": ("fine_tune.cli.merge", "adapter and base become one model, proven to say the same: fine-tune merge ckpt=runs/sft"),
    "verify": ("fine_tune.cli.verify", "does a folder or server say what was trained: fine-tune verify passport=runs/sft url=..."),
    "push": ("fine_tune.cli.push", "an adapter or merged model to the hub, with a card: fine-tune push ckpt=runs/sft repo=me/sft"),
    "demo": ("fine_tune.cli.demo", "the whole story on the built-in world: base, SFT, DPO, verdict, report"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the words after the verb to the verb's module.

    Args:
        argv: Words after the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    verb = words[0]
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        meant = f" Did you mean {close[0]}?" if close else ""
        print(f"{verb}: no such verb.{meant}\n\n{_usage()}", file=sys.stderr)
        return 2
    try:
        code: int = importlib.import_module(VERBS[verb][0]).main(words[1:])
    except KeyboardInterrupt as stopped:
        # While the verb itself is imported; what comes after that it tells itself.
        return tell_stopped(stopped)
    return code


def _usage() -> str:
    verbs = "\n".join(f"  {verb:<10} {purpose}" for verb, (_, purpose) in VERBS.items())
    return f"usage: fine-tune <verb> [key=value ...]\n\nverbs:\n{verbs}\n\nfine-tune <verb> --help says more."
