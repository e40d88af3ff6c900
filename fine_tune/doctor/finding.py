"""One line of the doctor's screen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["ok", "look", "broken"]


@dataclass(frozen=True)
class Finding:
    """Something that was looked at.

    Attributes:
        name: What.
        state: ``look`` is worth knowing; with ``broken`` something that runs need does not work.
        says: For people.
        values: For machines.
    """

    name: str
    state: State
    says: str
    values: Mapping[str, Any] = field(default_factory=dict)
