"""The doctor's findings on one screen, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from fine_tune.doctor.finding import Finding
from fine_tune.report.visible import visible

STYLES = {"ok": "green", "look": "yellow", "broken": "bold red"}


def screen(findings: Sequence[Finding]) -> Table:
    """Lay out the findings, what is broken last, where the eye is when it has been printed."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in sorted(findings, key=lambda one: one.state == "broken"):
        table.add_row(Text(finding.state, STYLES[finding.state]), visible(finding.name), Text(visible(finding.says)))
    return table


def as_json(findings: Sequence[Finding]) -> str:
    """Write the findings for machines."""
    healthy = all(finding.state != "broken" for finding in findings)
    return json.dumps({"healthy": healthy, "findings": [asdict(finding) for finding in findings]}, indent=2)
