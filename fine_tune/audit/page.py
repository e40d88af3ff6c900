"""An audit as one file that loads nothing and runs nothing, in the look of the run's report."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from fine_tune.audit.audit import Audit, advice
from fine_tune.audit.rows import Token
from fine_tune.report import histogram
from fine_tune.report.data_account import account
from fine_tune.report.page import TEMPLATES
from fine_tune.report.visible import clean, visible
from fine_tune.storage import write_text

OWN_TEMPLATES = Path(__file__).resolve().parent / "templates"
# Tokens at both ends of a longer part.
HEAD, TAIL = 1200, 600
CLASSES = {"learned": "l", "masked": "m", "cut": "c"}
OUTCOMES = {"passed": ("ok", "good"), "look": ("look", "open"), "failed": ("failed", "bad")}
# A mark where a line ends, which would not show otherwise.
LINE_END = Markup("<u></u>\n")


def write_page(found: Audit, file: Path, *, command: str) -> None:
    """Write the page.

    Raises:
        StorageError: The file cannot be written.
    """
    write_text(file, render(found, command=command))


def render(found: Audit, *, command: str) -> str:
    """Return the page."""
    style = "".join(
        (folder / name).read_text(encoding="utf-8")
        for folder, name in ((TEMPLATES, "report.css"), (OWN_TEMPLATES, "audit.css"))
    )
    # By its hash, the page's own style sheet is the only one a browser applies.
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader([OWN_TEMPLATES, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("audit.html.jinja").render(
        style=Markup(style),  # files of this package
        style_hash=digest,
        found=found,
        account=account(found.ledger.as_dict()),
        high=histogram.HIGH,
        wide=histogram.WIDE,
        outcomes=OUTCOMES,
        painted=painted,
        advice=advice,
        command=command,
    )


def painted(tokens: Sequence[Token]) -> Markup:
    """Write tokens with their states: one element for each, one around those of the same state."""
    if len(tokens) > HEAD + TAIL:
        left = Markup("<b class='left'> {} more tokens </b>").format(f"{len(tokens) - HEAD - TAIL:,}")
        return Markup("").join([*_elements(tokens[:HEAD]), left, *_elements(tokens[-TAIL:])])
    return Markup("").join(_elements(tokens))


def _elements(tokens: Sequence[Token]) -> Iterator[Markup]:
    state = ""
    for token in tokens:
        if token.state != state:
            yield Markup("</span><span class='{}'>" if state else "<span class='{}'>").format(CLASSES[token.state])
            state = token.state
        text = escape(visible(token.text)).replace("\n", LINE_END)
        # One text for both kinds keeps the page small: a page of long rows has tens of thousands.
        yield Markup("<i class=x title={}>{}</i>" if token.special else "<i title={}>{}</i>").format(token.id, text)
    if state:
        yield Markup("</span>")
