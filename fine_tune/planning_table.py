"""A memory plan on the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fine_tune.memory.estimate import Footprint
from fine_tune.planning import Planned
from fine_tune.report.visible import visible

PARTS = (
    ("base", "the base as it is stored"),
    ("trained", "what trains: weights, gradients, optimizer, frozen copies"),
    ("kept", "activations kept for the backward pass"),
    ("working", "one layer's backward pass, or the output head"),
)


def render(found: Planned) -> RenderableType:
    """Return what was planned: where the memory goes, what else would fit, and what was measured."""
    chosen = found.chosen
    cfg = found.cfg
    names = ", ".join(cfg[group]["name"] for group in ("model", "method", "objective"))
    head = f"{names} on {found.device}: trainer.speed={chosen.speed} trainer.micro_batch_tokens={chosen.tokens}"
    rows: list[RenderableType] = [Text(head, style="bold")]
    if found.peak is not None:
        rows.append(_parts(found, found.peak))
    else:
        rows.append(Text(visible(f"memory: no estimate for this model ({found.unknown})")))
    if found.speeds:
        rows.append(_speeds(found))
    if found.rehearsal is not None:
        rows.append(_rehearsal(found))
    return Group(*rows)


def _parts(found: Planned, peak: Footprint) -> Table:
    table = Table(title="peak of the fullest step", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for key, label in PARTS:
        table.add_row(label, f"{getattr(peak, key) / 1e9:.2f} GB")
    table.add_row("together", f"{peak.total / 1e9:.2f} GB", style="bold")
    if found.chosen.free is not None:
        table.add_row("free on the device", f"{found.chosen.free / 1e9:.2f} GB")
    table.add_row("fullest micro-batch", f"{found.fullest[1]:,} tokens (step {found.fullest[0] + 1})")
    return table


def _speeds(found: Planned) -> Table:
    table = Table("trainer.speed", "most tokens", "peak", title="what fits", title_justify="left")
    for name, (tokens, footprint, fits) in found.speeds.items():
        peak = f"{footprint.total / 1e9:.2f} GB"
        table.add_row(name, f"{tokens:,}" if fits else "none", peak if fits else f"{peak} for {tokens:,}")
    return table


def _rehearsal(found: Planned) -> Text:
    measured = found.rehearsal
    assert measured is not None
    if measured.peak is None or found.peak is None:
        return Text(f"rehearsal: the fullest step took {measured.seconds:.2f} s (a CPU's peak is not measured)")
    share = found.peak.total / measured.peak - 1
    return Text(
        f"rehearsal: the fullest step took {measured.seconds:.2f} s at a peak of {measured.peak / 1e9:.2f} GB; "
        f"predicted {found.peak.total / 1e9:.2f} GB ({share:+.1%})"
    )
