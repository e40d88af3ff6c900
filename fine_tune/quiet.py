"""What libraries say about themselves is kept off the terminal; their errors and our own lines stay."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from contextlib import suppress

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


def print_nowhere() -> None:
    """Send what is still printed to nobody; the files of a run have all of it that matters."""
    rich.get_console().quiet = True
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
