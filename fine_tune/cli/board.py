"""`board`: many runs, or a sweep's, ranked in one table and on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fine_tune.cli.verb import run_verb
from fine_tune.errors import ConfigError

USAGE = """usage: fine-tune board <folder> [<folder> ...] [metric=<name>] [out=<folder>]

Ranks runs, and draws their results over what differs between them:
  fine-tune board runs                      every run in a folder
  fine-tune board runs/sweep-1a2b3c4d       the runs of a sweep, failed jobs too
  fine-tune board runs/a runs/b             these

metric=<name>   what to rank by: exact_match, final_loss, preference_accuracy, or another figure of summary.json; by default what
                the sweep looked at, else exact_match where every finished run has it, else final_loss
out=<folder>    where board.html, board.csv and board.json are written; by default the folder itself, and beside runs
                that are named one by one"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the board verb and return its exit code.

    Args:
        argv: Words after the verb; None takes those of the process.
    """
    return run_verb(argv, USAGE, _board)


def _board(words: list[str]) -> None:
    folders, metric, out = _read(words)
    import rich

    from fine_tune.board.board import make_board
    from fine_tune.board.terminal import say

    say(make_board(folders, out=out, metric=metric), rich.get_console())


def _read(words: Sequence[str]) -> tuple[list[Path], str | None, Path]:
    """Part folders from settings, and tell every problem at once."""
    folders, found, problems = [], {}, []
    for word in words:
        key, equals, value = word.partition("=")
        if Path(word).is_dir() or not (equals or word.startswith("-")):
            folders.append(Path(word))
        elif key in ("metric", "out") and value and key not in found:
            found[key] = value
        else:
            problems.append(
                f"{word}: no setting of board. Pass folders of runs, and metric=<name> or out=<folder> once."
            )
    problems += [f"run = {folder}: no such folder. Pass folders of runs." for folder in folders if not folder.is_dir()]
    if not folders and not problems:
        problems.append("run: no folder. Pass a folder of runs, such as runs.")
    out = Path(found["out"]).expanduser() if "out" in found else _place(folders)
    if out is None and not problems:
        problems.append("out: no value. These lie in different folders; pass out=<folder> for the board's files.")
    elif out is not None and out.is_file():
        problems.append(f"out = {out}: is a file. Pass the name of a folder.")
    if problems:
        raise ConfigError(problems)
    return folders, found.get("metric"), out or Path()


def _place(folders: Sequence[Path]) -> Path | None:
    """Return the folder that was named, or the one that holds all that were; None where there is no such folder."""
    if len(folders) == 1:
        return folders[0]
    parents = {folder.resolve().parent for folder in folders}
    return parents.pop() if len(parents) == 1 else None
