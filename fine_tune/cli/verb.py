"""What the verbs share: help, and errors as one message with their exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from fine_tune.errors import FineTuneError
from fine_tune.report.visible import visible


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
        # Ids and paths in it come from files.
        print(visible(str(error)), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0
