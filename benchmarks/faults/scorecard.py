"""The scorecard: every fault with its two controls, as lines, totals, JSON and a table."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults.fault import Fault
from benchmarks.faults.judge import Verdict
from benchmarks.faults.moments import Missed
from benchmarks.faults.workshop import Workshop

ATTEMPTS = 3
JUDGE_ONLY = "the judge alone"


@dataclass
class Line:
    """One fault on the scorecard.

    Attributes:
        group: What it hits.
        name: Its name.
        what: What happened.
        verdict: How it ended; None where it could not be played.
        clean: Its clean-run control ended as the clean run.
        broken: The protection that was taken out in the other control.
        noticed: The judge noticed that.
        how: What the judge noticed.
        missed: Why it could not be played.
    """

    group: str
    name: str
    what: str
    verdict: Verdict | None = None
    clean: bool | None = None
    broken: str = ""
    noticed: bool | None = None
    how: str = ""
    missed: str = ""


@dataclass
class Scorecard:
    """All lines, and the controls that several of them share."""

    lines: list[Line] = field(default_factory=list)
    clean_controls: dict[str, Verdict] = field(default_factory=dict)
    unharmed: dict[str, Verdict] = field(default_factory=dict)

    def totals(self) -> dict[str, Any]:
        """Count."""
        played = [line for line in self.lines if line.verdict is not None]
        verdicts = [line.verdict for line in played if line.verdict is not None]
        return {
            "faults": len(self.lines),
            "injected": len(played),
            "survived": sum(verdict.survived for verdict in verdicts),
            "wrong results": sum(verdict.wrong for verdict in verdicts),
            "steps lost": sum(verdict.lost for verdict in verdicts),
            "clean controls": len(self.clean_controls),
            "clean controls that ended clean": sum(verdict.survived for verdict in self.clean_controls.values()),
            "broken controls": sum(line.noticed is not None for line in played),
            "broken controls noticed": sum(bool(line.noticed) for line in played),
            "of these on the judge alone": sum(line.broken == JUDGE_ONLY for line in played),
            "variants unharmed without a fault": f"{sum(v.survived for v in self.unharmed.values())} of {len(self.unharmed)}",
        }

    def write(self, folder: Path, name: str = "scorecard") -> None:
        """Write it as JSON and as a table in Markdown."""
        content = {"totals": self.totals(), **asdict(self)}
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (folder / f"{name}.md").write_text(self.markdown(), encoding="utf-8")

    def markdown(self) -> str:
        """Return the table for a page of documentation."""
        rows = [
            "| Fault | What happens | Survived | Steps lost | Wrong result | Exit codes | Control: taken out | Noticed |"
        ]
        rows.append("|---|---|---|---|---|---|---|---|")
        for line in self.lines:
            verdict = line.verdict
            if verdict is None:
                rows.append(f"| {line.name} | {line.what} | not played: {line.missed} | | | | | |")
                continue
            cells = [line.name, line.what, yes(verdict.survived), str(verdict.lost), yes(verdict.wrong)]
            cells += [", ".join(map(str, verdict.codes)), line.broken, yes(bool(line.noticed))]
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        totals = ", ".join(f"{key}: {value}" for key, value in self.totals().items())
        return "\n".join([*rows, "", totals, ""])


def yes(value: bool) -> str:
    """Say yes or no."""
    return "yes" if value else "no"


def play_all(
    workshop: Workshop,
    faults: list[tuple[str, Fault]],
    *,
    jobs: int,
    told: Callable[[str, Verdict | None], None],
    scorecard: Scorecard,
) -> None:
    """Play every fault, then every control, several at a time, and fill the scorecard.

    Args:
        workshop: Prepared for the faults' jobs.
        faults: Group and fault.
        jobs: Scenes at a time.
        told: Called with the name of each scene that has ended, and its verdict if it has one.
        scorecard: Filled.
    """
    scorecard.lines += [
        Line(group, fault.name, fault.what, broken=fault.broken or JUDGE_ONLY) for group, fault in faults
    ]
    played = list(zip([fault for _, fault in faults], scorecard.lines, strict=True))
    clean = {_control(fault): fault for fault, _ in played}
    variants = {fault.broken: fault for fault, _ in played if fault.broken}

    def inject(fault: Fault, line: Line) -> None:
        line.verdict, line.missed = _injected(workshop, fault)
        told(fault.name, line.verdict)

    def control(fault: Fault, line: Line) -> None:
        found = None if line.verdict is None else _without_protection(workshop, fault, line.verdict)
        line.noticed, line.how = (
            found is not None and not found.survived,
            "; ".join(found.reasons[:2]) if found else "not played",
        )
        told(f"{fault.name}, {line.broken}", None)

    def end_clean(name: str, fault: Fault) -> None:
        found = _told_anyway(lambda: workshop.play(fault, f"control-{name.replace(', ', '-')}", armed=False))
        scorecard.clean_controls[name] = found
        told(f"no fault: {name}", found)

    def end_unharmed(name: str, fault: Fault) -> None:
        scorecard.unharmed[name] = _told_anyway(lambda: workshop.unharmed(name, fault.job, cold=fault.cold))
        told(f"no fault, {name}", scorecard.unharmed[name])

    with ThreadPoolExecutor(jobs) as pool:
        _wait(pool.submit(inject, fault, line) for fault, line in played)
        rest = [pool.submit(end_clean, name, fault) for name, fault in clean.items()]
        rest += [pool.submit(control, fault, line) for fault, line in played]
        _wait([*rest, *(pool.submit(end_unharmed, name, fault) for name, fault in variants.items())])
    for fault, line in played:
        line.clean = scorecard.clean_controls[_control(fault)].survived


def _told_anyway(play: Callable[[], Verdict]) -> Verdict:
    """Play something; a harness that fails is told like a fault that was not survived."""
    try:
        return play()
    except Exception as error:
        return Verdict(False, 0, False, [], "", [f"{type(error).__name__}: {error}"])


def _wait(tasks: Iterable[Future[None]]) -> None:
    for task in list(tasks):
        task.result()


def _control(fault: Fault) -> str:
    return f"{fault.job.name}, {fault.story.kind}{', cold' if fault.cold else ''}"


def num_scenes(faults: list[tuple[str, Fault]]) -> int:
    """Count the scenes of faults and controls."""
    controls = {_control(fault) for _, fault in faults}
    return 2 * len(faults) + len(controls) + len({fault.broken for _, fault in faults if fault.broken})


def _injected(workshop: Workshop, fault: Fault) -> tuple[Verdict | None, str]:
    """Play a fault; a moment that was missed is waited for again."""
    if fault.needs_root and os.geteuid() != 0:
        return None, "it wants root"
    reason = ""
    for attempt in range(ATTEMPTS):
        try:
            return workshop.play(fault, _numbered(f"fault-{fault.name}", attempt)), ""
        except Missed as error:
            reason = str(error)
        except Exception as error:
            # A harness that fails is no fault survived.
            return Verdict(False, 0, False, [], "", [f"{type(error).__name__}: {error}"]), ""
    return None, reason


def _without_protection(workshop: Workshop, fault: Fault, verdict: Verdict) -> Verdict | None:
    """Play a fault with its protection taken out; where none can be, judge its results with one bit changed."""
    if not fault.broken:
        return workshop.tampered(fault, f"tampered-{fault.name}") if verdict.survived else None
    for attempt in range(ATTEMPTS):
        # A harness that fails has shown nothing either.
        with suppress(Exception):
            return workshop.play(fault, _numbered(f"broken-{fault.name}", attempt), broken=True)
    return None


def _numbered(name: str, attempt: int) -> str:
    return f"{name}-{attempt + 1}" if attempt else name
