"""Text and figures of a run as they may stand in a page: nothing hidden in them, nothing too long."""

from __future__ import annotations

import json
import math
from typing import Any

from markupsafe import Markup

from fine_tune.visible import visible as visible

NOTHING = "-"
MAX_CHARACTERS = 4000


def clean(value: Any) -> Any:
    """Make what a template prints visible; markup is the template's own and stays as it is."""
    return value if isinstance(value, Markup) else visible(value if isinstance(value, str) else plain(value))


def number(value: Any) -> float | None:
    """Return a finite number, or None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def plain(value: Any, form: str = "") -> str:
    """Write any JSON value for a reader.

    Args:
        value: What a file held.
        form: A format for numbers, such as ``{:.2f} GB``; without one, four significant digits.

    Example:
        >>> [plain(v) for v in (1234567, 0.000123456, 2.0, None, True, float("nan"))]
        ['1,234,567', '0.0001235', '2', '-', 'yes', 'not finite']
        >>> plain(0.5, "{:.0%}")
        '50%'
    """
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return brief(value)
    found = number(value)
    if found is not None:
        return _figure(value, form)
    if isinstance(value, int | float):
        return "not finite" if isinstance(value, float) else f"a number of {value.bit_length()} bits"
    return brief(compact(value), 400)


def _figure(value: int | float, form: str) -> str:
    if form:
        try:
            return form.format(value)
        except (ValueError, IndexError, KeyError):
            return plain(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.4g}" if 1e-4 <= abs(value) < 1e4 else f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def compact(value: Any) -> str:
    """Write a nested value on one line."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (RecursionError, ValueError, TypeError):
        return "(nested too deeply to show)"


def brief(text: str, limit: int = MAX_CHARACTERS) -> str:
    """Cut a long text and say by how much."""
    return text if len(text) <= limit else f"{text[:limit]} ... ({len(text) - limit:,} more characters)"
