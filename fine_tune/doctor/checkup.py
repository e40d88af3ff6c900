"""Everything the doctor looks at; what cannot be looked at is itself a finding."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

from fine_tune.doctor.finding import Finding

# Native libraries that every run loads; the others are judged by their versions, since importing all takes long.
NATIVE = ("torch", "bitsandbytes")


def check_up() -> list[Finding]:
    """Look at versions, libraries, devices, 4-bit arithmetic and places."""
    return list(_all())


def _all() -> Iterator[Finding]:
    from fine_tune.doctor.versions import installed, version_findings

    yield from version_findings(installed())
    broken = [finding for finding in map(_import, NATIVE) if finding is not None]
    yield from broken
    if not any(finding.values["package"] == "torch" for finding in broken):
        from fine_tune.doctor.devices import device_findings

        yield from _guarded("devices", device_findings)
    from fine_tune.doctor.places import place_findings

    yield from _guarded("places", place_findings)


def _import(name: str) -> Finding | None:
    try:
        importlib.import_module(name)
    except Exception as error:
        # A broken native library throws anything.
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        return Finding(name, "broken", f"cannot be imported: {said}", {"package": name})
    return None


def _guarded(name: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Go on where one look fails: a doctor is asked when something is broken."""
    try:
        yield from look()
    except Exception as error:
        yield Finding(name, "broken", f"{type(error).__name__}: {error}".splitlines()[0])
