"""What the verbs share: help, and errors as one message with their exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence

from fine_tune.errors import FineTuneError
from fine_tune.redaction import masked
from fine_tune.visible import visible

# Of an unexpected traceback, as many as a screen keeps in view together with the line above them.
LAST_LINES = 14


def run_verb(
    argv: Sequence[str] | None, usage: str, action: Callable[[list[str]], None], *, needs_words: bool = True
) -> int:
    """Hand the words to a verb's action and return the exit code.

    Args:
        argv: Words after the verb; None takes those of the process.
        usage: What ``--help`` prints, and, with ``needs_words``, no words at all (which is exit code 2).
        action: What the verb does.
        needs_words: The verb does nothing by itself.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if (needs_words and not words) or any(word in ("-h", "--help") for word in words):
        print(usage, file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    try:
        action(words)
    except FineTuneError as error:
        return tell(error)
    except KeyboardInterrupt as stopped:
        return tell_stopped(stopped)
    except Exception as error:
        return tell_unexpected(error)
    return 0


def tell(error: FineTuneError) -> int:
    """Print an error on stderr and return its exit code.

    Ids, paths and other libraries' words in it come from anywhere: they act on no terminal, and no secret is in them.
    """
    print(visible(masked(str(error))), file=sys.stderr)
    return error.exit_code


def tell_stopped(stopped: KeyboardInterrupt) -> int:
    """Say on stderr that Ctrl-C ended a verb, in its own words where it has some, and return the exit code."""
    print(visible(masked(str(stopped))) or "stopped by Ctrl-C", file=sys.stderr)
    return 130


def tell_unexpected(error: Exception) -> int:
    """Print the end of the traceback of a mistake of our own, without secrets, and return its exit code."""
    lines = masked("".join(traceback.format_exception(error))).rstrip().splitlines()
    told = "\n".join(["unexpected error; error.log in the run's folder has all of it:", *lines[-LAST_LINES:]])
    print(visible(told), file=sys.stderr)
    return 1
