"""What a task of lm-evaluation-harness would run: refused unless asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fine_tune import safe_load
from fine_tune.errors import DataError, UnsafeArtifact


def refuse_code(entries: Mapping[str, Any], own: Path | None) -> None:
    """Refuse tasks that would run code which is neither ours nor the harness's.

    Args:
        entries: lm-eval's index entries by name.
        own: The folder with task files of one's own.

    Raises:
        UnsafeArtifact: The first task that would, and what it would run.
    """
    own = None if own is None else own.resolve()
    for name, entry in entries.items():
        file = None if entry.yaml_path is None else Path(entry.yaml_path).resolve()
        foreign = own is not None and file is not None and file.is_relative_to(own)
        cfg = entry.cfg or {}
        members = cfg["task"] if isinstance(cfg.get("task"), list) else []
        reasons = [reason for one in (cfg, *members) if isinstance(one, dict) for reason in _reasons(one, foreign)]
        reasons += _code_of(file, set()) if foreign and file is not None else []
        if reasons:
            raise UnsafeArtifact(
                f"eval.tasks: {name} {' and '.join(dict.fromkeys(reasons))}. Read that code, then pass eval.unsafe_code=true, "
                "or leave the task out."
            )


def _reasons(cfg: Mapping[str, Any], foreign: bool) -> list[str]:
    reasons = []
    if cfg.get("unsafe_code"):
        reasons.append("runs what the model wrote (unsafe_code)")
    if (cfg.get("dataset_kwargs") or {}).get("trust_remote_code"):
        reasons.append("runs its data set's code (trust_remote_code)")
    if metrics := _unknown_metrics(cfg, foreign):
        reasons.append(f"takes the metric {', '.join(metrics)} and its code from elsewhere")
    return reasons


def _unknown_metrics(cfg: Mapping[str, Any], foreign: bool) -> list[str]:
    """Name the metrics that lm-eval does not have itself and would look for on the hub or on disk."""
    import lm_eval.api.metrics  # noqa: F401 - registers them
    from lm_eval.api.registry import METRIC_REGISTRY

    # Elsewhere than in generation lm-eval computes the known names itself.
    asked = cfg.get("output_type", "generate_until") == "generate_until" and cfg.get("process_results") is None
    if not foreign and (not asked or "class" in cfg):
        return []
    metrics = [one for one in cfg.get("metric_list") or [] if isinstance(one, dict)]
    # In the index a function shows as its path; the harness's own come with the package.
    named = [one for one in metrics if foreign or not Path(str(one.get("metric"))).is_absolute()]
    return [
        str(one.get("metric")) for one in named if one.get("hf_evaluate") or one.get("metric") not in METRIC_REGISTRY
    ]


def _code_of(file: Path, seen: set[Path]) -> list[str]:
    """Tell what Python a task file calls for, itself or through the files that it includes."""
    if file in seen:
        return []
    seen.add(file)
    calls: list[str] = []

    def noted(name: str) -> str:
        calls.append(name)
        return name

    try:
        found = safe_load.yaml_text(file.read_text(encoding="utf-8"), tags={"!function": noted})
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({str(error).splitlines()[0]}). Correct the task file.") from error
    found = found if isinstance(found, dict) else {}
    called = [f"calls {name} ({file.name})" for name in calls]
    if "class" in found and not called:
        called.append(f"names a class ({file.name})")
    included = found.get("include") or []
    for name in included if isinstance(included, list) else [included]:
        called += _code_of((file.parent / str(name)).resolve(), seen)
    return called


def use_sandbox() -> None:
    """Render the tasks' own Jinja in a sandbox: lm-eval's environment would let a task file reach Python."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    if not isinstance(utils.env, SandboxedEnvironment):
        sandbox = SandboxedEnvironment(undefined=utils.env.undefined, keep_trailing_newline=True)
        sandbox.filters.update(utils.env.filters)
        utils.env = sandbox
