"""Protections taken out on purpose: with each of them the judge must notice the faults that it is there for.

Every variant changes the imported package of one process and nothing on disk. A name that is not there any more raises, so
that a variant which has lost its target cannot pass for a broken one.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

VARIANTS: dict[str, Callable[[], None]] = {}


def variant(function: Callable[[], None]) -> Callable[[], None]:
    """Enter a function among the variants."""
    VARIANTS[function.__name__] = function
    return function


def replace(module: str, name: str, make: Callable[[Any], Any]) -> None:
    """Replace a function, here and wherever it was imported to, by what ``make`` makes of it."""
    home = importlib.import_module(module)
    old = getattr(home, name)
    new = make(old)
    setattr(home, name, new)
    for other in list(sys.modules.values()):
        if getattr(other, "__name__", "").startswith("fine_tune") and getattr(other, name, None) is old:
            setattr(other, name, new)


def replace_method(module: str, owner: str, name: str, make: Callable[[Any], Any]) -> None:
    """Replace a method of a class."""
    home = getattr(importlib.import_module(module), owner)
    setattr(home, name, make(getattr(home, name)))


def nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing."""
