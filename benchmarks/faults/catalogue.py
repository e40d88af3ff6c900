"""All faults, by what they hit."""

from __future__ import annotations

from benchmarks.faults import answers, damage, disk, inputs, locks, network, pairs, signals, surroundings
from benchmarks.faults.fault import Fault

GROUPS: dict[str, list[Fault]] = {
    "signals": signals.FAULTS,
    "checkpoints and run files": damage.FAULTS,
    "disk, memory and limits": disk.FAULTS,
    "runs that meet": locks.FAULTS,
    "inputs": inputs.FAULTS,
    "servers, devices, secrets": network.FAULTS,
    "surroundings": surroundings.FAULTS,
    "evaluation": answers.FAULTS,
    "preferences": pairs.FAULTS,
}


def catalogue() -> list[tuple[str, Fault]]:
    """Return every fault with its group."""
    return [(group, fault) for group, faults in GROUPS.items() for fault in faults]


def chosen(known: list[tuple[str, Fault]], names: list[str]) -> list[tuple[str, Fault]]:
    """Return those of the given names, all where there are none.

    Raises:
        SystemExit: A name is unknown.
    """
    found = [fault.name for _, fault in known]
    if unknown := set(names) - set(found):
        raise SystemExit(f"no such fault: {', '.join(sorted(unknown))}. Known: {', '.join(found)}.")
    return [(group, fault) for group, fault in known if not names or fault.name in names]
