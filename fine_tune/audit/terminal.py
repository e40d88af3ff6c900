"""An audit on the terminal: checks, ledger, lengths, and rows with their tokens coloured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fine_tune.audit.audit import Audit, advice
from fine_tune.audit.rows import Part, Shown, Token
from fine_tune.report.visible import visible

STYLES = {"learned": "bold green", "masked": "bright_black", "cut": "red strike"}
SPECIAL = "underline"
OUTCOMES = {"passed": ("ok", "green"), "look": ("look", "yellow"), "failed": ("FAIL", "bold red")}
# Tokens at both ends of a longer part, and the width of the longest bar.
HEAD, TAIL, BAR = 160, 80, 40
MAX_BARS = 12


def show(found: Audit, console: Console) -> None:
    """Print an audit; every text of the data is made visible and none of it is markup."""
    facts = Text("\n").join(Text.assemble((f"{label:<14}", "dim"), visible(value)) for label, value in found.facts)
    console.print(facts)
    console.print(found.ledger.render())
    console.print(_bars(found.ledger.length_histogram))
    for row in found.rows:
        console.print(_row(row))
    if found.frequent:
        console.print(_frequent(found))
    console.print(_legend())
    console.print(_checks(found))


def _checks(found: Audit) -> Table:
    table = Table(
        title="checks", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_header=False
    )
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in found.checks:
        word, style = OUTCOMES[check.outcome]
        table.add_row(Text(word, style), check.name, Text(visible(check.says)))
    return table


def _bars(histogram: Mapping[str, Sequence[int]]) -> RenderableType:
    """Lengths before any cut, in at most ``MAX_BARS`` lines."""
    edges, counts = histogram.get("edges", []), histogram.get("counts", [])
    if not counts:
        return Text("no row was encoded")
    step = -(-len(counts) // MAX_BARS)
    grouped = [
        (edges[i], edges[min(i + step, len(counts))] - 1, sum(counts[i : i + step]))
        for i in range(0, len(counts), step)
    ]
    most = max(count for _, _, count in grouped)
    lines = [f"{low:>7,} to {high:>7,} {'#' * -(-count * BAR // most)} {count:,}" for low, high, count in grouped]
    return Text("\n".join(["rows by length in tokens, before any cut", *lines, ""]))


def _row(row: Shown) -> RenderableType:
    head = Text.assemble(("\n" + row.kind, "bold"), f"  {visible(row.name)}  ", (row.split, "dim"))
    figures = f"  {row.num_tokens:,} tokens, {row.num_learned:,} learned, {row.num_cut:,} cut"
    lines: list[RenderableType] = [head.append(figures if row.parts else "", "dim")]
    for part in row.parts:
        lines.append(_part(part))
    lines += [Text(visible(said), "yellow") for said in (row.note, advice(row), *(row.differences or ())) if said]
    return Group(*lines)


def _part(part: Part) -> Text:
    text = Text(overflow="fold")
    if part.title:
        text.append(f"[{part.title}] ", "bold cyan")
    for style, run in groupby(_shortened(part.tokens), key=_style):
        text.append("".join(visible(one if isinstance(one, str) else one.text) for one in run), style)
    return text


def _style(token: Token | str) -> str:
    if isinstance(token, str):
        return "italic"
    return f"{STYLES[token.state]} {SPECIAL}" if token.special else STYLES[token.state]


def _shortened(tokens: Sequence[Token]) -> Iterator[Token | str]:
    if len(tokens) <= HEAD + TAIL:
        yield from tokens
        return
    yield from tokens[:HEAD]
    yield f" [... {len(tokens) - HEAD - TAIL:,} more tokens ...] "
    yield from tokens[-TAIL:]


def _frequent(found: Audit) -> Table:
    title = "\nmost frequent completions"
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_header=False
    )
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis")
    for count, share, text in found.frequent:
        table.add_row(f"{count:,}", f"{share:.1%}", Text(visible(text).replace("\n", "\\n")))
    return table


def _legend() -> Text:
    words = [
        ("learned", STYLES["learned"]),
        ("  only read", STYLES["masked"]),
        ("  cut", STYLES["cut"]),
        ("  special token", SPECIAL),
    ]
    return Text.assemble(*words)
