"""The typed schema of ``sweep=``: which jobs a sweep has; nothing here imports torch."""

from __future__ import annotations

from typing import Literal

from fine_tune.schema_types import AtLeast0, AtLeast1, Node, Seed, Text


class Sweep(Node):
    """Values to try: all combinations of them (``grid``), or as many as a search asks for (``search``).

    ``params`` holds, per key, what would stand behind it on the command line, such as ``8,16`` or ``interval(1e-5, 1e-3)``.
    """

    kind: Literal["grid", "search"]
    params: dict[str, str | int | float]
    metric: Text | None
    direction: Literal["minimize", "maximize"] | None
    num_trials: AtLeast1 | None
    sampler: Literal["tpe", "random"] | None
    pruner: Literal["median", "none"] | None
    startup_trials: AtLeast0 | None
    warmup_steps: AtLeast0 | None
    seed: Seed | None
    storage: Text | None
