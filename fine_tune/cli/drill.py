"""`drill`: what this framework promises, tried on the user's own config, model and rows."""

from __future__ import annotations

import difflib
import itertools
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fine_tune.allocator import let_segments_grow
from fine_tune.cli.verb import run_verb
from fine_tune.cli.words import flag, read_beside_config
from fine_tune.config import check_config
from fine_tune.errors import ConfigError
from fine_tune.threads import wait_politely
from fine_tune.visible import visible

USAGE = """usage: fine-tune drill resume      [words of train ...] [steps=6] [run_dir=<folder>]
       fine-tune drill equivalence [words of train ...] [steps=2] [run_dir=<folder>] [float64=true|false]

resume       runs the config for a few steps straight, and once more killed with SIGKILL and resumed. Adapter, optimizer,
             schedule, random states and metrics must be the same: on a CPU bit for bit, on a GPU within a bound that is
             measured by running straight twice. A run resumed without the optimizer's state is the control.
equivalence  takes the first steps of the config in several ways (one micro-batch or many, packed or row by row, activations
             kept or computed again, one process or two) and compares loss and gradients. Mistakes made on purpose, such as a
             mean of means, are the control.
  fine-tune drill resume model=llama2_7b method=qlora data=oasst1 data.path=oasst1.jsonl
  fine-tune drill equivalence objective=dpo model=qwen data=ultrafeedback

steps=<number>   optimizer steps
run_dir=<folder> where everything is left; runs/drill-<kind>-<number> by default
float64=true     equivalence: also in float64, where bounds are tightest; by default where the model has at most 100 M weights

Exit code 1 if something differs that must not, or a control is not told apart; that of a run if it failed."""

KINDS = ("resume", "equivalence")
# Fewer steps than this leave no middle to be killed in.
FEWEST = {"resume": 3, "equivalence": 1}
STEPS = {"resume": 6, "equivalence": 2}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the drill verb and return its exit code.

    Args:
        argv: Words after the verb; None takes those of the process.
    """
    return run_verb(argv, USAGE, _drill)


def _drill(typed: list[str]) -> None:
    kind, words = typed[0], typed[1:]
    if kind not in KINDS:
        close = difflib.get_close_matches(kind, KINDS, n=1)
        meant = f"Did you mean {close[0]}?" if close else f"Choose from {', '.join(KINDS)}."
        raise ConfigError(f"{kind}: no such drill. {meant}")
    readers: dict[str, Callable[[str], Any]] = {"steps": _at_least(FEWEST[kind])}
    if kind == "equivalence":
        readers["float64"] = flag
    own, cfg = read_beside_config(words, readers)
    rest = [word for word in words if word.partition("=")[0] not in readers]
    _refuse(cfg, kind)
    steps = own.get("steps", STEPS[kind])
    if kind == "resume":
        from fine_tune.drills.words import run_words

        # What a run of the drill would refuse is told before anything is started.
        check_config(run_words(rest, cfg, steps=steps, save_every=max(1, steps // 3)))
    folder = _folder(cfg, kind)
    let_segments_grow()
    wait_politely()
    # The first import of torch, after everything that can be refused without it.
    import rich

    if kind == "resume":
        from fine_tune.drills.resume import drill_resume

        drilled = drill_resume(rest, cfg, folder=folder, steps=steps)
    else:
        from fine_tune.drills.equivalence import drill_equivalence

        drilled = drill_equivalence(cfg, folder=folder, steps=steps, wide=own.get("float64"))
    drilled.show(rich.get_console())
    record = drilled.write(shlex.join(["fine-tune", "drill", *typed]))
    print(visible(f"everything is kept in {folder}, the record is {record}"))
    drilled.refuse()


def _at_least(fewest: int) -> Callable[[str], int]:
    def read(value: str) -> int:
        if not (value.isascii() and value.isdigit() and int(value) >= fewest):
            raise ValueError(f"must be a whole number of at least {fewest}")
        return int(value)

    return read


def _refuse(cfg: Mapping[str, Any], kind: str) -> None:
    """Refuse what a drill does not do, all of it together."""
    problems = []
    if cfg["resume"]:
        problems.append("resume: a drill makes runs of its own. Pass the words of a new run.")
    if cfg["trainer"]["num_nodes"] > 1:
        problems.append(f"trainer.num_nodes={cfg['trainer']['num_nodes']}: a drill stays on one machine. Leave it out.")
    if kind == "equivalence" and cfg["trainer"]["devices"] > 1:
        problems.append(f"trainer.devices={cfg['trainer']['devices']}: the drill starts its two processes itself. Leave it out.")
    if "RANK" in os.environ:
        problems.append("torchrun: a drill starts its processes itself. Run it without torchrun.")
    if problems:
        raise ConfigError(problems)


def _folder(cfg: Mapping[str, Any], kind: str) -> Path:
    """Make the folder where everything is left."""
    named = cfg["run_dir"] or (f"runs/{cfg['run_name']}" if cfg["run_name"] else None)
    if named:
        folder = Path(named).expanduser()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"run_dir={named}: is there already. Choose another, or delete it.")
    else:
        folder = next(
            place for number in itertools.count(1) if not (place := Path("runs") / f"drill-{kind}-{number}").exists()
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder
