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
    "summary": (),
    # Errors are what every room may raise.
    "storage": ("errors",),
    "device": ("errors", "kernels"),
    "interrupts": ("errors",),
    "targets": ("errors",),
    "text": ("errors",),
    "checkpoints": ("errors", "storage"),
    "run_folder": ("errors", "redaction", "storage", "watching"),
    "reference_store": ("errors", "storage"),
    # Models score packed rows (packing, losses), and an export carries its chat template (text).
    "models": ("errors", "kernels", "losses", "packing", "text"),
    # The built-in base is pretrained on text of its own making.
    "world": ("errors", "text"),
    # Rows become tables (text) and tables become step batches (packing); the built-in task is a source like others.
    "data": ("errors", "packing", "text", "world"),
    "modules": ("errors", "losses", "models", "packing"),
    # Held-out questions are rows of data; answers go through the training path's own encoding.
    "evaluation": ("data", "errors", "losses", "models", "packing", "rng", "storage", "text"),
    # A run's own held-out answers are judged by the verdict of evaluations.
    "report": ("config", "errors", "evaluation", "overrides", "storage", "summary"),
    # Trackers see what the run's files say; W&B's process imports nothing of ours but how to mask a secret.
    "tracking": ("redaction", "storage", "targets"),
    # Many runs read as the report reads one.
    "board": ("errors", "redaction", "report", "run_folder", "storage", "summary"),
    "callbacks": (
        "checkpoints", "data", "device", "errors", "evaluation", "interrupts", "models", "modules", "packing",
        "reference_store", "rng", "storage", "text", "tracking", "watching",
    ),
    # What an artifact must say again wherever it is served: rendered, encoded and generated as in evaluation.
    "passport": ("errors", "evaluation", "models", "storage", "text"),
    # The config side: knows names and rules, never a tensor.
    "overrides": ("problems", "redaction"),
    "training_rules": ("problems", "rules"),
    "preference_rules": ("rules",),
    "data_rules": ("data", "errors", "problems", "rules"),
    "checks": ("data_rules", "preference_rules", "problems", "rules", "schema", "targets", "training_rules"),
    "config": ("checks", "errors", "overrides", "problems", "schema"),
    "showing": ("config", "errors", "overrides", "problems", "schema"),
    # The run: takes plain values and puts the rooms together.
    # What runs of one process share: a base, and what it answered.
    "kept": ("evaluation",),
    "assembly": ("callbacks", "data", "device", "errors", "kept", "models", "modules", "rng", "targets", "text"),
    "opening": ("assembly", "checkpoints", "data", "device", "errors", "models", "report", "rules", "run_folder", "storage"),
    "starting": ("checkpoints", "errors", "models", "modules", "opening", "storage"),
    "fitting": (
        "assembly", "callbacks", "checkpoints", "data", "device", "errors", "evaluation", "interrupts", "kept", "losses",
        "models", "modules", "reference_store", "run_folder", "speed", "targets", "tracking", "watching",
    ),
    "quiet": (),
    "speed": ("device", "models"),
    "memory": ("losses", "models"),
    "memory_plan": ("device", "memory", "models", "speed"),
    "training_data": ("assembly", "callbacks", "data", "memory_plan", "targets", "text"),
    "planning": (
        "assembly", "data", "device", "errors", "fitting", "memory", "memory_plan", "models", "modules", "quiet", "speed",
        "starting", "training_data",
    ),
    "planning_table": ("memory", "planning", "report"),
    # Evaluation: checkpoints found and loaded, asked, and compared.
    "evaluation_schema": ("schema", "schema_types"),
    "evaluation_config": ("checks", "config", "errors", "evaluation_schema", "overrides", "problems", "schema", "schema_types"),
    "own_template": ("errors", "models", "passport", "text"),
    "subjects": ("assembly", "checkpoints", "device", "errors", "evaluation", "models", "own_template", "storage", "text"),
    # From checkpoint to artifact: what is written must say what base and adapter say.
    "merging": (
        "assembly", "device", "errors", "evaluation", "kernels", "models", "passport", "quiet", "rng", "run_folder", "storage",
        "subjects", "text",
    ),
    "verifying": ("device", "errors", "models", "passport", "quiet", "rng", "subjects", "text"),
    # A card is of inert text, as a report's page is.
    "pushing": ("errors", "models", "redaction", "report", "storage"),
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
        "assembly", "callbacks", "checkpoints", "data", "device", "errors", "evaluation", "fitting", "interrupts", "kept",
        "memory_plan", "models", "opening", "passport", "quiet", "report", "run_folder", "speed", "starting", "storage", "summary",
        "targets", "text", "training_data", "watching",
    ),
    # Many runs: what they share, how they ended, and their board.
    "sweeps": (
        "board", "config", "errors", "interrupts", "kept", "opening", "overrides", "redaction", "report", "run_folder", "runs",
        "storage", "watching",
    ),
    # Doors.
    "api": ("allocator", "config", "errors", "evaluating", "evaluation_config", "interrupts", "runs", "threads"),
    "__init__": ("api",),
    "cli": (
        "allocator", "audit", "board", "chat", "chat_config", "config", "doctor", "errors", "evaluating", "evaluation_config",
        "evaluation_schema", "merging", "overrides", "planning", "planning_table", "pushing", "redaction", "report", "runs",
        "showing", "sweeps", "threads", "verifying", "__init__",
    ),
    "__main__": ("cli",),
}  # fmt: skip

# The only files that may know Hydra and OmegaConf.
CONFIG_FILES = {"config.py", "evaluation_config.py", "overrides.py", "showing.py", "cli/train.py"}
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


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call by its dotted name, as far as it has one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


FORBIDDEN = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads", "joblib.load", "marshal.loads", "eval", "exec",
    "hydra.utils.instantiate", "instantiate", "hydra.utils.call", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system",
}  # fmt: skip


def problems(source: str, name: str) -> list[str]:
    """What a file does that would run what it reads."""
    found = []
    for called, node in calls(ast.parse(source)):
        if called in FORBIDDEN:
            found.append(f"{called} runs what it reads")
        if called == "torch.load" and name != "checkpoints.py":
            found.append("torch.load belongs in checkpoints.py")
        for keyword in node.keywords:
            literal = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            unsafe = (keyword.arg, literal) in {("weights_only", False), ("allow_pickle", True), ("shell", True)}
            if unsafe or (keyword.arg == "trust_remote_code" and literal is True):
                found.append(f"{called}({keyword.arg}={literal})")
        if called == "torch.load" and "weights_only" not in {k.arg for k in node.keywords}:
            found.append("torch.load says weights_only=True in so many words")
    return found


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_nothing_runs_what_it_reads(file: Path) -> None:
    assert problems(file.read_text(encoding="utf-8"), relative(file)) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(f, weights_only=False)", "torch.load(f)", "pickle.load(f)", "hydra.utils.instantiate(cfg)", "eval(text)",
        "np.load(f, allow_pickle=True)", "AutoModel.from_pretrained(x, trust_remote_code=True)", "yaml.load(f)",
    ],
)  # fmt: skip
def test_each_way_to_run_a_file_is_caught(source: str) -> None:
    assert problems(source, "checkpoints.py")
    assert problems(source, "models/base.py")


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
