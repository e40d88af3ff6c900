"""What a drill compared, by how much it differed, and what was allowed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import rich
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fine_tune.errors import FineTuneError
from fine_tune.report.visible import visible
from fine_tune.storage import write_json

RECORD = "drill.json"


class Differs(FineTuneError):
    """A drill found a difference beyond its bound, or could not have found one."""

    exit_code = 1


@dataclass(frozen=True)
class Finding:
    """One comparison.

    Attributes:
        name: What was compared.
        gaps: Differences by what they are of, each relative; infinite where shapes or names differ.
        bounds: What each may be at most; 0 is bit for bit. For a control: what at least one of them must exceed.
        detail: What was counted, or where the largest difference is.
        is_control: Broken on purpose: it must differ.
        skipped: Why it was not compared; empty where it was.
        group: What it belongs to, such as a precision.
    """

    name: str
    gaps: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    detail: str = ""
    is_control: bool = False
    skipped: str = ""
    group: str = ""

    @property
    def passed(self) -> bool:
        """It is as it must be; what was skipped has not failed."""
        if self.skipped:
            return True
        if self.is_control:
            return any(gap > self.bounds[key] for key, gap in self.gaps.items())
        return all(gap <= self.bounds[key] for key, gap in self.gaps.items())

    @property
    def label(self) -> str:
        """Its name with what it belongs to."""
        return f"{self.group}: {self.name}" if self.group else self.name

    @property
    def verdict(self) -> str:
        """One word for people."""
        if self.skipped:
            return "skipped"
        if self.is_control:
            return "told apart" if self.passed else "NOT TOLD APART"
        return "same" if self.passed else "DIFFERS"


@dataclass(frozen=True)
class Drilled:
    """A drill that was done.

    Attributes:
        kind: Its name.
        folder: Where everything it made was left.
        findings: What it compared.
        facts: What else there is to know, for the record.
        lines: Sentences for people, below the table.
    """

    kind: str
    folder: Path
    findings: Sequence[Finding]
    facts: dict[str, Any] = field(default_factory=dict)
    lines: Sequence[str] = ()

    @property
    def failed(self) -> list[Finding]:
        """The comparisons that are not as they must be."""
        return [finding for finding in self.findings if not finding.passed]

    def write(self, command: str) -> Path:
        """Write drill.json beside what was made."""
        file = self.folder / RECORD
        listed = [{**_as_json(finding), "passed": finding.passed} for finding in self.findings]
        write_json(
            file,
            {"drill": self.kind, "command": command, "passed": not self.failed, **self.facts, "findings": listed},
        )
        return file

    def show(self, console: Console) -> None:
        """Print the table and what is below it."""
        keys = list(dict.fromkeys(key for finding in self.findings for key in finding.gaps))
        table = Table(title=f"drill {self.kind}", title_justify="left", box=SIMPLE_HEAD)
        table.add_column("compared")
        for column in (*(key or "difference" for key in keys), "allowed", ""):
            table.add_column(column, justify="right")
        group = ""
        for finding in self.findings:
            if finding.group != group:
                group = finding.group
                table.add_section()
                table.add_row(Text(visible(group), style="bold"))
            numbers = [_number(finding.gaps[key]) if key in finding.gaps else "-" for key in keys]
            cells = (finding.name, *numbers, _allowed(finding), finding.verdict)
            table.add_row(*(Text(visible(cell)) for cell in cells))
        console.print(table)
        left_out = [f"Skipped: {one.label}: {one.skipped}." for one in self.findings if one.skipped]
        for line in (*left_out, *self.lines):
            console.print(Text(visible(line)))

    def refuse(self) -> None:
        """Raise where something is not as it must be.

        Raises:
            Differs: All of it together.
        """
        if not self.failed:
            return
        told = "\n".join(
            f"  - {finding.label}: {_numbers(finding.gaps)}; allowed: {_allowed(finding)}. {finding.detail}".rstrip()
            for finding in self.failed
        )
        raise Differs(f"drill {self.kind}: {len(self.failed)} of {len(self.findings)} are not as they must be:\n{told}")


def tell(line: str) -> None:
    """Print a line as it is."""
    rich.get_console().print(visible(line), markup=False, highlight=False)


@contextmanager
def quietly() -> Iterator[None]:
    """Leave out what loading says of rows and starts: the run itself says it, and a drill loads several times."""
    console = rich.get_console()
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


def _as_json(finding: Finding) -> dict[str, Any]:
    values = asdict(finding)
    # JSON has no infinity; what differs in shape is told as text.
    values["gaps"] = {key: gap if gap < float("inf") else "infinite" for key, gap in finding.gaps.items()}
    return values


def _numbers(gaps: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {_number(gap)}".strip() for key, gap in gaps.items())


def _number(gap: float) -> str:
    return "none" if gap == 0 else f"{gap:.1e}"


def _allowed(finding: Finding) -> str:
    if not finding.bounds:
        return "-"
    bounds = " / ".join(_number(bound) for bound in finding.bounds.values())
    if finding.is_control:
        return f"over {bounds}" if any(finding.bounds.values()) else "must differ"
    return bounds
