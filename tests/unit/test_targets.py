"""What a config may name as a class, and that everything else is refused before it is imported."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fine_tune import targets
from fine_tune.errors import ConfigError

HOSTILE = [
    "os.system",
    "posix.system",
    "builtins.eval",
    "builtins.__import__",
    "subprocess.run",
    "subprocess.Popen",
    "pathlib.Path.unlink",
    "shutil.rmtree",
    "importlib.import_module",
    "pickle.loads",
    "torch.load",
    "torch.hub.load",
    "torch.optim.optimizer.Optimizer.__subclasses__",
    "torch.optim.lr_scheduler.LambdaLR",
    "torch.optim.torch.hub.load",
    "torch.optim.adamw",
    "fine_tune.targets.importlib.import_module",
    "fine_tune.targets.build",
    "fine_tune.data.module.Callable",
    "fine_tune.data.module.DataLoader",
    "fine_tune.data.module.PackedDataModule.__init__",
    "fine_tune.data..os.System",
    "fine_tune.data.__builtins__.Eval",
    "lightning.pytorch.callbacks.ModelCheckpoint",
    "lightning.pytorch.callbacks.OnExceptionCheckpoint",
    "lightning.pytorch.callbacks.LambdaCallback",
    "hydra.utils.instantiate",
    "AdamW",
    "",
    "torch.optim.AdamW ",
    "torch.optim.\u0410damW",
]
ALLOWED = [
    "torch.optim.AdamW",
    "bitsandbytes.optim.PagedAdamW32bit",
    "lightning.pytorch.callbacks.EarlyStopping",
    "lightning.pytorch.loggers.CSVLogger",
    "fine_tune.data.module.PackedDataModule",
    "fine_tune.modules.sft.SFTModule",
]


@pytest.mark.parametrize("target", HOSTILE)
def test_hostile_targets_are_refused(target: str) -> None:
    with pytest.raises(ConfigError, match="_target_"):
        targets.build({"_target_": target, "path": "nothing"})


@pytest.mark.parametrize("target", [5, None, ["os.system"], {"a": 1}])
def test_a_target_is_a_name(target: object) -> None:
    with pytest.raises(ConfigError, match="is not a class name"):
        targets.build({"_target_": target})


def test_a_foreign_module_is_refused_before_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "canary_module.py").write_text(
        "from pathlib import Path\nPath(__file__ + '.ran').touch()\nclass C: ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for target in ("canary_module.C", "fine_tune.data.canary_module.C", "torch.optim.canary_module.C"):
        with pytest.raises(ConfigError):
            targets.build({"_target_": target})
    assert "canary_module" not in sys.modules
    assert not (tmp_path / "canary_module.py.ran").exists()


@pytest.mark.parametrize("target", ALLOWED)
def test_our_classes_and_listed_ones_are_allowed(target: str) -> None:
    assert targets.refusal(target) is None


def test_build_passes_the_nodes_keys_and_extras() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = targets.build({"_target_": "torch.optim.AdamW", "lr": 0.5}, params=[weight])
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["lr"] == 0.5


def test_extras_win_over_the_node() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    assert (
        targets.build({"_target_": "torch.optim.SGD", "lr": 0.5}, params=[weight], lr=0.25).defaults["lr"]
        == 0.25
    )


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"_partial_": True}, "_partial_"),
        ({"_args_": ["rm"]}, "_args_"),
        ({"betas": {"_target_": "os.system"}}, "betas._target_"),
        ({"betas": [{"x": {"_target_": "os.system"}}]}, r"betas\[0\].x._target_"),
        ({"lrr": 1}, "lrr"),
    ],
)
def test_nothing_is_smuggled_in_beside_the_target(extra: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        targets.build({"_target_": "torch.optim.AdamW", **extra}, params=[torch.nn.Parameter(torch.ones(1))])


def test_targets_are_found_at_any_depth() -> None:
    tree = {"a": {"_target_": "x"}, "b": [{"c": {"_target_": "y"}}], "d": 1}
    assert list(targets.targets_in(tree)) == [("a._target_", "x"), ("b[0].c._target_", "y")]


def _calls_to_instantiate(repository: Path) -> Iterator[str]:
    for file in (repository / "fine_tune").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom | ast.Import) else []
            )
            names += [node.attr] if isinstance(node, ast.Attribute) else []
            if {"instantiate", "get_class", "get_object", "import_module"} & set(names):
                yield file.relative_to(repository / "fine_tune").as_posix()


def test_nothing_else_turns_names_into_objects(repository: Path) -> None:
    # cli/main.py imports the modules of a fixed table of verbs, the doctor a fixed list of libraries.
    assert set(_calls_to_instantiate(repository)) <= {"targets.py", "cli/main.py", "doctor/checkup.py"}
