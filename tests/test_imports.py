"""Which room may import which, and what no file may do at all."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "fine_tune"
FILES = sorted(PACKAGE.rglob("*.py"))

# Each room (a folder, or a file beside them), what it may import of ours, and why. Only rooms above it may appear.
ARROWS: dict[str, tuple[str, ...]] = {
    # Ground: nothing of ours, so that anything may stand on it.
    "errors": (),
    "threads": (),
    "allocator": (),
    "redaction": (),
    "rng": (),
    "losses": (),  # pure functions on tensors
    "kernels": (),  # operations of our own, on plain tensors
    "packing": (),  # pure functions of lengths and step numbers
    "rules": (),
    "schema_types": (),
    "watching": (),
    "logger_schema": ("schema_types",),
    "sweep_schema": ("schema_types",),
    "schema": ("logger_schema", "schema_types", "sweep_schema"),
    "problems": (),
    "visible": (),
    "summary": ("visible",),
    # Errors are what every room may raise.
    "safe_load": ("errors",),  # what opens files from elsewhere
    "storage": ("errors",),
    "device": ("errors", "kernels"),
    "interrupts": ("errors",),
    "targets": ("errors",),
    "text": ("errors",),
    "checkpoints": ("errors", "safe_load", "storage"),
    "run_folder": ("errors", "redaction", "storage", "watching"),
    "reference_store": ("errors", "safe_load", "storage"),
    # Models score packed rows (packing, losses), and an export carries its chat template (text).
    "models": ("errors", "kernels", "losses", "packing", "safe_load", "storage", "text"),
    # The built-in base is pretrained on text of its own making.
    "world": ("errors", "text"),
    # Rows become tables (text) and tables become step batches (packing); the built-in task is a source like others.
    "data": ("errors", "packing", "text", "visible", "world"),
    "modules": ("errors", "losses", "models", "packing"),
    # Held-out questions are rows of data; answers go through the training path's own encoding.
    "evaluation": ("data", "errors", "losses", "models", "packing", "rng", "safe_load", "storage", "text", "visible"),
    # A run's own held-out answers are judged by the verdict of evaluations.
    "report": ("config", "errors", "evaluation", "overrides", "safe_load", "storage", "summary", "visible"),
    # Trackers see what the run's files say; W&B's process imports nothing of ours but how to mask a secret.
    "tracking": ("redaction", "storage", "targets", "visible"),
    # Many runs read as the report reads one.
    "board": ("errors", "redaction", "report", "run_folder", "storage", "summary"),
    "callbacks": (
        "checkpoints", "data", "device", "errors", "evaluation", "interrupts", "models", "modules", "packing",
        "reference_store", "rng", "storage", "text", "tracking", "visible", "watching",
    ),
    # What an artifact must say again wherever it is served: rendered, encoded and generated as in evaluation.
    "passport": ("errors", "evaluation", "models", "storage", "text"),
    # The config side: knows names and rules, never a tensor.
    "overrides": ("problems", "redaction", "safe_load"),
    "training_rules": ("problems", "rules"),
    "preference_rules": ("rules",),
    "data_rules": ("data", "errors", "problems", "rules"),
    "checks": ("data_rules", "preference_rules", "problems", "rules", "schema", "targets", "training_rules"),
    "references": ("checks",),
    "config": ("checks", "errors", "overrides", "problems", "references", "safe_load", "schema"),
    "showing": ("config", "errors", "overrides", "problems", "safe_load", "schema"),
    # The run: takes plain values and puts the rooms together.
    # What runs of one process share: a base, and what it answered.
    "kept": ("evaluation",),
    "assembly": ("callbacks", "data", "device", "errors", "kept", "models", "modules", "rng", "targets", "text"),
    "opening": (
        "assembly", "checkpoints", "data", "device", "errors", "models", "report", "rules", "run_folder", "safe_load", "storage",
    ),
    "starting": ("checkpoints", "errors", "models", "modules", "opening", "safe_load", "storage"),
    "fitting": (
        "assembly", "callbacks", "checklist", "checkpoints", "data", "device", "errors", "evaluation", "interrupts", "kept",
        "losses", "models", "modules", "reference_store", "run_folder", "speed", "targets", "tracking", "watching",
    ),
    "quiet": (),
    "speed": ("device", "models"),
    "memory": ("losses", "models"),
    "memory_plan": ("device", "memory", "models", "speed"),
    "training_data": ("assembly", "callbacks", "data", "memory_plan", "targets", "text"),
    # Whatever can be refused before a weight is loaded, all at once.
    "preflight": (
        "assembly", "checkpoints", "data", "errors", "interrupts", "memory", "memory_plan", "models", "starting", "text",
        "training_data",
    ),
    # What every run proves about itself at its first steps.
    "checklist": ("data", "errors", "models", "modules", "packing", "rng", "storage", "text", "training_data", "visible"),
    "planning": (
        "assembly", "data", "device", "errors", "fitting", "memory", "memory_plan", "models", "modules", "quiet", "speed",
        "starting", "training_data",
    ),
    "planning_table": ("memory", "planning", "report"),
    # Evaluation: checkpoints found and loaded, asked, and compared.
    "evaluation_schema": ("schema", "schema_types"),
    "evaluation_config": ("checks", "config", "errors", "evaluation_schema", "overrides", "problems", "schema", "schema_types"),
    "own_template": ("errors", "models", "passport", "text"),
    "subjects": (
        "assembly", "checkpoints", "device", "errors", "evaluation", "models", "own_template", "safe_load", "storage", "text",
    ),
    # From checkpoint to artifact: what is written must say what base and adapter say.
    "merging": (
        "assembly", "device", "errors", "evaluation", "kernels", "models", "passport", "quiet", "rng", "run_folder", "safe_load",
        "storage", "subjects", "text",
    ),
    "verifying": ("device", "errors", "models", "passport", "quiet", "rng", "subjects", "text"),
    # A card is of inert text, as a report's page is.
    "pushing": ("errors", "models", "redaction", "report", "safe_load", "storage"),
    "evaluation_parts": ("data", "errors", "evaluation", "subjects"),
    "evaluating": (
        "callbacks", "device", "errors", "evaluation", "evaluation_parts", "interrupts", "quiet", "report", "rng",
        "run_folder", "storage", "subjects",
    ),
    "chat_config": ("errors", "evaluation_config", "evaluation_schema", "schema", "schema_types"),
    "chat": (
        "device", "errors", "evaluation", "interrupts", "models", "problems", "quiet", "report", "rng", "storage", "subjects",
        "text",
    ),
    # What the model will see, through the ways that training, previews, evaluations and chats take.
    "audit": (
        "assembly", "chat", "data", "errors", "evaluation", "models", "quiet", "report", "storage", "text",
    ),
    # Stands on little: it is asked when something else is broken.
    "doctor": ("data", "device", "errors", "report"),
    "runs": (
        "assembly", "callbacks", "checklist", "checkpoints", "data", "device", "errors", "evaluation", "fitting", "interrupts",
        "kept", "memory_plan", "models", "opening", "passport", "preflight", "quiet", "report", "run_folder", "speed", "starting",
        "storage", "summary", "targets", "text", "training_data", "watching",
    ),
    # Many runs: what they share, how they ended, and their board.
    "sweeps": (
        "board", "config", "errors", "interrupts", "kept", "opening", "overrides", "redaction", "report", "run_folder", "runs",
        "storage", "watching",
    ),
    # Promises tried on the user's own config: runs as a user starts them, and steps taken in several ways.
    "drills": (
        "assembly", "checkpoints", "data", "device", "errors", "fitting", "memory_plan", "models", "modules", "packing", "quiet",
        "report", "safe_load", "speed", "starting", "storage", "training_data",
    ),
    # Doors.
    "api": ("allocator", "config", "errors", "evaluating", "evaluation_config", "interrupts", "runs", "threads"),
    "__init__": ("api",),
    "cli": (
        "allocator", "audit", "board", "chat", "chat_config", "config", "doctor", "drills", "errors", "evaluating",
        "evaluation_config", "evaluation_schema", "merging", "overrides", "planning", "planning_table", "pushing", "redaction",
        "report", "runs", "showing", "sweeps", "threads", "verifying", "visible", "__init__",
    ),
    "__main__": ("cli",),
}  # fmt: skip

# The only files that may know Hydra and OmegaConf.
CONFIG_FILES = {"config.py", "references.py", "evaluation_config.py", "overrides.py", "showing.py", "cli/train.py"}
# What must answer before torch is imported: a config problem is told in a second.
LIGHT = ("fine_tune", "fine_tune.config", "fine_tune.cli.main", "fine_tune.cli.train", "fine_tune.errors")


def relative(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def room(file: Path) -> str:
    parts = file.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else file.stem


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "fine_tune":
                yield from (f"fine_tune.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def arrows(file: Path) -> set[str]:
    names = (name.split(".") for name in imported(ast.parse(file.read_text(encoding="utf-8"))))
    return {parts[1] for parts in names if parts[0] == "fine_tune" and len(parts) > 1} - {room(file)}


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_a_room_imports_only_what_it_may(file: Path) -> None:
    assert room(file) in ARROWS, f"{relative(file)}: a new room; give it a line in ARROWS"
    upward = arrows(file) - set(ARROWS[room(file)])
    assert not upward, f"{relative(file)} imports {sorted(upward)}; ARROWS does not allow it"


def test_the_table_has_no_circle_and_no_room_that_is_gone() -> None:
    below: set[str] = set()
    left = dict(ARROWS)
    while left:
        free = [name for name, needs in left.items() if set(needs) <= below]
        assert free, f"these rooms import each other in a circle: {sorted(left)}"
        below.update(free)
        left = {name: needs for name, needs in left.items() if name not in free}
    assert {room(file) for file in FILES} == set(ARROWS)


def test_an_import_upward_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "losses").mkdir()
    for text in (
        "from fine_tune.models import base",
        "def f():\n    import fine_tune.models.base",
        "from fine_tune import models",
    ):
        (tmp_path / "losses" / "x.py").write_text(text + "\n")
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
            assert arrows(tmp_path / "losses" / "x.py") == {"models"}
            with pytest.raises(AssertionError, match=r"losses/x\.py imports \['models'\]"):
                test_a_room_imports_only_what_it_may(tmp_path / "losses" / "x.py")


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_only_the_config_side_knows_hydra(file: Path) -> None:
    found = {name.split(".")[0] for name in imported(ast.parse(file.read_text(encoding="utf-8")))}
    if relative(file) not in CONFIG_FILES:
        assert not found & {"hydra", "omegaconf"}


def test_losses_know_torch_only() -> None:
    for file in (PACKAGE / "losses").glob("*.py"):
        names = imported(ast.parse(file.read_text(encoding="utf-8")))
        found = {name.split(".")[0] for name in names if not name.startswith("fine_tune.losses.")}
        assert found <= {"__future__", "typing", "torch"}, relative(file)


@pytest.mark.parametrize("file", [f for f in FILES if f.name == "__init__.py"], ids=relative)
def test_package_files_hold_no_code(file: Path) -> None:
    body = ast.parse(file.read_text(encoding="utf-8")).body
    if file.parent == PACKAGE:
        names = ("evaluate", "train")
        assert [ast.unparse(line) for line in body[1:]] == [f"from fine_tune.api import {x} as {x}" for x in names]
        body = [body[0]]
    assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)


def test_a_config_problem_is_told_before_torch_is_imported() -> None:
    code = (
        f"import sys\nfor name in {LIGHT}: __import__(name)\n"
        + "print([m for m in ('torch', 'lightning') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
