"""`doctor`: whether this machine and what is installed on it can do what runs need."""

from __future__ import annotations

from collections.abc import Sequence

from fine_tune.cli.verb import run_verb
from fine_tune.errors import ConfigError, EnvironmentProblem
from fine_tune.threads import wait_politely

USAGE = """usage: fine-tune doctor [json=true]

Looks at versions (also those that are known to be bad), devices, memory, 4-bit arithmetic against float64, disks, caches
and variables, and says it on one screen. Exit code 5 if something that runs need is broken.

json=true   the same for machines"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the doctor verb and return its exit code.

    Args:
        argv: Words after the verb; None takes those of the process.
    """
    return run_verb(argv, USAGE, _doctor, needs_words=False)


def _doctor(words: list[str]) -> None:
    if wrong := [word for word in words if word not in ("json=true", "json=false")]:
        raise ConfigError([f"{word}: no setting of doctor. It takes json=true." for word in wrong])
    wait_politely()
    import rich

    from fine_tune.doctor.checkup import check_up
    from fine_tune.doctor.screen import as_json, screen

    findings = check_up()
    if "json=true" in words:
        print(as_json(findings))
    else:
        rich.get_console().print(screen(findings))
    if broken := [finding.name for finding in findings if finding.state == "broken"]:
        raise EnvironmentProblem(f"doctor: {len(broken)} finding(s) are broken: {', '.join(broken)}.")
