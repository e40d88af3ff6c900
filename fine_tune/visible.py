"""Text from elsewhere as a terminal, a page or a card may show it: nothing in it acts, nothing in it is hidden."""

from __future__ import annotations

import unicodedata

# Line breaks and tabs are layout; joiners are part of how Persian, Indic scripts and emoji are written.
KEPT = "\n\t\u200c\u200d"
# Controls, format characters (bidi marks, tags, zero widths), lone surrogates, line and paragraph separators.
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def visible(text: str) -> str:
    r"""Write characters that act instead of showing as escapes.

    Example:
        >>> print(visible("a\x1b[31mb\u202ec"))
        a\x1b[31mb\u202ec
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(c) if c not in KEPT and unicodedata.category(c) in HIDDEN else c for c in text)


def blanked(text: str, *, kept: str = "") -> str:
    r"""Write a blank for each character that does not print, but for those in ``kept``: for tables, where room is short.

    Example:
        >>> print(blanked("a\x1b[31m\nb"))
        a [31m b
    """
    return "".join(c if c.isprintable() or c in kept else " " for c in text)


def _escape(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
