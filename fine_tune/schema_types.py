"""The types of the schema's values and the base of its groups; nothing here imports torch."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

RUN_NAME_FORM = re.compile(r"[A-Za-z0-9._-]{1,100}")


def _run_name(name: str) -> str:
    if not RUN_NAME_FORM.fullmatch(name) or set(name) == {"."}:
        raise ValueError("must be 1 to 100 characters of A-Z a-z 0-9 . _ -, and not only dots")
    return name


def _text(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not hold a NUL character")
    return value


def _target_modules(value: Any) -> Any:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError("must be all-linear or a list of layer names such as [q_proj,v_proj]")
    return value


Text = Annotated[str, Field(min_length=1), AfterValidator(_text)]
AtLeast0 = Annotated[int, Field(ge=0)]
AtLeast1 = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
BelowHalf = Annotated[float, Field(ge=0, lt=0.5)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
RunName = Annotated[str, AfterValidator(_run_name)]
TargetModules = Annotated[Any, AfterValidator(_target_modules)]
Batch = Literal["conversations", "documents", "pairs"]


class Node(BaseModel):
    """One group of keys; unknown keys, wrong types and non-finite numbers are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class Plugin(Node):
    """A node that names its class; its other keys are that class's arguments."""

    model_config = ConfigDict(extra="allow", strict=True)
    target: Text = Field(alias="_target_")
