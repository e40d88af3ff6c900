"""What libraries say about themselves is kept off the terminal; their errors and our own lines stay."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import rich


def quiet_libraries() -> None:
    """Silence them for this process, and let it go on where nobody reads what it prints any more."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # torch says of selective recomputation what its documentation says.
    talkers = ("lightning.pytorch", "lightning.fabric", "bitsandbytes", "torch.distributed", "torch._higher_order_ops.wrap")
    for name in talkers:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lightning|bitsandbytes|peft|transformers|torch)\b")
    # Rich would end the process without a word: `| head`, or a viewer that was closed, is no reason to end a night's run.
    rich.get_console().on_broken_pipe = print_nowhere  # type: ignore[method-assign]
    if not isinstance(sys.unraisablehook, _WithoutDeadWorkers):
        sys.unraisablehook = _WithoutDeadWorkers(sys.unraisablehook)


class _WithoutDeadWorkers:
    """What Python prints of errors that nobody can catch, but for a dead data worker's, which ends the run in our own words.

    torch raises it from a signal handler, in whatever happens to run, such as the end of an older loader.
    """

    def __init__(self, before: Callable[[Any], Any]) -> None:
        self.before = before

    def __call__(self, found: Any) -> None:
        if not (isinstance(found.exc_value, RuntimeError) and str(found.exc_value).startswith("DataLoader worker")):
            self.before(found)


def print_nowhere() -> None:
    """Send what is still printed to nobody; the files of a run have all of it that matters."""
    rich.get_console().quiet = True
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
