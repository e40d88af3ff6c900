"""What could run a file, leak a secret or let text act is called in one place each, and nowhere else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent.parent / "fine_tune"
FILES = sorted(PACKAGE.rglob("*.py"))
NOWHERE: frozenset[str] = frozenset()
PAGES = frozenset({"audit/page.py", "board/page.py", "report/page.py"})
# The last two make skeletons without a weight.
PROCESSES = frozenset(
    {"run_folder.py", "merging/reloaded.py", "tracking/wandb_tracker.py", "drills/children.py", "drills/ranks.py"}
)
LOADS_BASES = frozenset({"models/base.py", "merging/reload.py", "world/pretrain.py", "merging/skeleton.py", "memory/shape.py"})
# A name, or a module with all that is in it -> the files that may use it. The longest name that fits decides.
ONLY_IN: dict[str, frozenset[str]] = {
    # Objects out of files.
    "pickle": frozenset({"safe_load.py"}), "pickle.load": NOWHERE, "pickle.loads": NOWHERE,
    "pickle.Unpickler": NOWHERE, "_pickle": NOWHERE, "cPickle": NOWHERE,
    "dill": NOWHERE, "cloudpickle": NOWHERE, "joblib": NOWHERE, "marshal": NOWHERE, "shelve": NOWHERE, "numpy.load": NOWHERE,
    "torch.load": frozenset({"safe_load.py"}), "torch.jit.load": NOWHERE, "torch.hub": NOWHERE, "torch.package": NOWHERE,
    "torch.serialization": NOWHERE, "pandas.read_pickle": NOWHERE,
    # Weights and text from elsewhere.
    "safetensors.torch.load_file": frozenset({"safe_load.py"}), "safetensors.torch.load_model": NOWHERE,
    "safetensors.torch.load": NOWHERE, "safetensors.safe_open": frozenset({"safe_load.py"}),
    "yaml": frozenset({"safe_load.py", "run_folder.py", "pushing/card.py"}), "yaml.safe_load": NOWHERE,
    "yaml.SafeLoader": frozenset({"safe_load.py"}), "yaml.safe_dump": frozenset({"run_folder.py", "pushing/card.py"}),
    "yaml.load": NOWHERE, "yaml.load_all": NOWHERE, "yaml.full_load": NOWHERE, "yaml.unsafe_load": NOWHERE,
    "yaml.Loader": NOWHERE, "yaml.FullLoader": NOWHERE, "yaml.UnsafeLoader": NOWHERE, "ruamel": NOWHERE,
    "omegaconf.OmegaConf.load": NOWHERE, "omegaconf.OmegaConf.register_new_resolver": NOWHERE,
    # Names and text that become code.
    "eval": NOWHERE, "exec": NOWHERE, "compile": NOWHERE, "__import__": NOWHERE, "builtins": NOWHERE, "runpy": NOWHERE,
    "importlib.import_module": frozenset({"targets.py", "cli/main.py", "doctor/checkup.py"}),
    "importlib.util.spec_from_file_location": NOWHERE, "hydra.utils": NOWHERE, "hydra._internal": NOWHERE,
    "pydoc.locate": NOWHERE, "pkgutil": NOWHERE,
    # Other programs.
    "os.system": NOWHERE, "os.popen": NOWHERE, "os.execv": NOWHERE, "os.execvp": NOWHERE, "os.spawnv": NOWHERE,
    "os.startfile": NOWHERE, "posix": NOWHERE, "pty": NOWHERE, "commands": NOWHERE,
    "subprocess": PROCESSES,
    # The network.
    "requests": NOWHERE, "httpx": NOWHERE, "aiohttp": NOWHERE, "http": NOWHERE, "ftplib": NOWHERE, "smtplib": NOWHERE,
    "urllib": frozenset({"verifying/endpoint.py"}),
    "huggingface_hub": frozenset({"models/hub.py", "data/readers.py", "evaluation/harness_tasks.py", "pushing/push.py"}),
    "datasets": frozenset({"data/readers.py", "evaluation/harness_tasks.py"}),
    # Archives and temporary names.
    "tarfile": NOWHERE, "zipfile": NOWHERE, "shutil.unpack_archive": NOWHERE, "tempfile.mktemp": NOWHERE,
    # Models: with files, and with code of a repository only as the config says.
    "transformers.AutoModelForCausalLM": LOADS_BASES,
    "transformers.AutoModel": NOWHERE, "transformers.pipeline": NOWHERE, "peft.PeftModel.from_pretrained": NOWHERE,
    "peft.AutoPeftModel": NOWHERE, "transformers.dynamic_module_utils": NOWHERE,
    # Text that a page takes for markup, and text that hides.
    "markupsafe.Markup": PAGES | {"report/visible.py"}, "jinja2.Environment": PAGES,
    "jinja2.Template": frozenset({"text/template.py"}),
    "html": NOWHERE, "unicodedata.category": frozenset({"visible.py"}),
    # Tracebacks hold the words of any library: only through what masks secrets.
    "traceback": frozenset({"run_folder.py", "cli/verb.py"}), "sys.excepthook": NOWHERE, "logging.FileHandler": NOWHERE,
    "logging.basicConfig": NOWHERE, "faulthandler": NOWHERE, "cgitb": NOWHERE,
}  # fmt: skip
# Arguments that must not be these.
UNSAFE_ARGUMENTS = {
    ("weights_only", False), ("allow_pickle", True), ("shell", True), ("trust_remote_code", True), ("autoescape", False),
    ("markup", True),
}  # fmt: skip
# Calls that must say this.
MUST_SAY = {"torch.load": ("weights_only", True), "jinja2.Environment": ("autoescape", True)}
# Bare prints of the doors: what is made visible, and text of our own.
PRINTED = re.compile(r"visible\(|USAGE|usage|_usage\(\)|help_text\(|as_json\(|json\.dumps\(|f'the same on ")
PRINTS = {"cli", "sweeps/sweep.py"}
# Scripts of their own and what writes to its own pipe.
OWN_PRINTS = {"world/pretrain.py", "tracking/wandb_process.py", "merging/reload.py"}


def named(tree: ast.AST) -> dict[str, str]:
    """What each name of a file stands for, as far as an import says."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = alias.name if alias.asname else alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (left := dotted(node.value)):
        return f"{left}.{node.attr}"
    return None


def used(tree: ast.AST) -> Iterator[str]:
    """The full name of whatever a file imports, or reaches through what it imported, or calls of Python's own."""
    names = named(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif (name := dotted(node)) and (first := name.split(".")[0]) in names:
            yield names[first] + name[len(first) :]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id


def allowed(name: str) -> frozenset[str] | None:
    """The files that may use a name, None where all may."""
    parts = name.split(".")
    fitting = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((ONLY_IN[one] for one in fitting if one in ONLY_IN), None)


def problems(source: str, file: str) -> list[str]:
    """What a file does that belongs elsewhere."""
    tree = ast.parse(source)
    names = named(tree)
    found = [f"{name} is not for {file}" for name in used(tree) if (files := allowed(name)) is not None and file not in files]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func) or ""
        full = names.get(called.split(".")[0], called.split(".")[0]) + called[len(called.split(".")[0]) :]
        said = {k.arg: k.value.value for k in node.keywords if k.arg and isinstance(k.value, ast.Constant)}
        found += [f"{called}({key}={value})" for key, value in said.items() if (key, value) in UNSAFE_ARGUMENTS]
        if full in MUST_SAY and said.get(MUST_SAY[full][0]) is not MUST_SAY[full][1]:
            found.append(f"{called} without {MUST_SAY[full][0]}={MUST_SAY[full][1]}")
        if called == "print":
            found += unescaped(node, file)
    return found


def unescaped(node: ast.Call, file: str) -> list[str]:
    if file in OWN_PRINTS:
        return []
    if file not in PRINTS and file.split("/")[0] not in PRINTS:
        return [f"{file} prints; a console of rich's does"]
    shown = [ast.unparse(argument) for argument in node.args]
    ours = [isinstance(a, ast.Constant | ast.JoinedStr) and file in ("cli/main.py", "cli/train.py") for a in node.args]
    return [f"print({text})" for text, own in zip(shown, ours, strict=True) if not own and not PRINTED.match(text)]


def test_each_dangerous_call_has_one_place() -> None:
    found = {
        name: told
        for file in FILES
        if (told := problems(file.read_text(encoding="utf-8"), name := file.relative_to(PACKAGE).as_posix()))
    }
    assert found == {}


def test_every_place_that_is_named_is_there_and_needs_it() -> None:
    uses = {file.relative_to(PACKAGE).as_posix(): set(used(ast.parse(file.read_text(encoding="utf-8")))) for file in FILES}
    for name, files in ONLY_IN.items():
        for file in files:
            assert any(f"{one}.".startswith(f"{name}.") for one in uses[file]), f"{file} no longer uses {name}"


PLANTED = [
    "import torch\ntorch.load(f, weights_only=True)", "from torch import load as read\nread(f)", "import pickle",
    "from pickle import loads", "import dill", "import joblib", "import marshal", "import shelve", "import _pickle",
    "import numpy as np\nnp.load(f)", "import numpy\nnumpy.load(f, allow_pickle=True)", "import yaml\nyaml.safe_load(t)",
    "import yaml\nyaml.load(t, yaml.Loader)", "from yaml import unsafe_load", "from safetensors.torch import load_file",
    "from safetensors import safe_open", "import torch.hub", "import torch\ntorch.hub.load('a/b', 'c')", "eval(text)", "exec(text)",
    "compile(text, 'f', 'exec')", "__import__(name)", "import importlib\nimportlib.import_module(name)",
    "from importlib import import_module", "from hydra.utils import instantiate", "import hydra\nhydra.utils.get_class(x)",
    "import os\nos.system(x)", "from os import popen", "import posix", "import subprocess\nsubprocess.run(x)",
    "run(x, shell=True)", "import requests", "from urllib.request import urlopen", "import http.client",
    "import huggingface_hub", "from datasets import load_dataset", "import tarfile", "import zipfile",
    "import shutil\nshutil.unpack_archive(f)", "import tempfile\ntempfile.mktemp()",
    "from transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained(x)",
    "from transformers import AutoModel", "from peft import PeftModel\nPeftModel.from_pretrained(m, x)",
    "f(x, trust_remote_code=True)", "from markupsafe import Markup", "from jinja2 import Environment", "import html",
    "import unicodedata\nunicodedata.category(c)", "import traceback", "import logging\nlogging.basicConfig()",
    "print(text)", "from omegaconf import OmegaConf\nOmegaConf.load(f)",
]  # fmt: skip


@pytest.mark.parametrize("source", PLANTED)
def test_each_is_caught_where_it_does_not_belong(source: str) -> None:
    assert problems(source, "models/planted.py")


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("import torch\ntorch.load(f)", "safe_load.py"),
        ("import torch\ntorch.load(f, weights_only=False)", "safe_load.py"),
        ("import yaml\nyaml.load(t, yaml.Loader)", "safe_load.py"),
        ("import pickle\npickle.loads(b)", "safe_load.py"),
        ("from jinja2 import Environment\nEnvironment(loader=x)", "report/page.py"),
        ("from jinja2 import Environment\nEnvironment(autoescape=False)", "report/page.py"),
        ("import subprocess\nsubprocess.run(x, shell=True)", "run_folder.py"),
        ("print(error)", "cli/train.py"),
    ],
)
def test_the_place_of_a_call_does_not_allow_its_unsafe_form(source: str, file: str) -> None:
    assert problems(source, file)


def test_harmless_code_passes() -> None:
    source = "import re\nimport torch\nmodel.eval()\nre.compile('x')\ntorch.compile(model)\nprint(visible(text))"
    assert problems(source, "cli/report.py") == []


RAW = re.compile(r"\|\s*safe\b|autoescape\s+false|\bMarkup\b|<script(?![^>]*>\s*\{\{ script \}\}\s*</script>)", re.IGNORECASE)


def test_no_template_of_a_page_lets_text_act() -> None:
    found = [file for folder in ("report", "board", "audit") for file in (PACKAGE / folder / "templates").glob("*.jinja")]
    assert len(found) >= 6
    assert [file.name for file in found if RAW.search(file.read_text(encoding="utf-8"))] == []
    for planted in ("{{ text|safe }}", "{{ text | safe }}", "{% autoescape false %}", "<script>{{ text }}</script>"):
        assert RAW.search(planted)


def test_chat_templates_of_anybody_are_rendered_in_a_sandbox() -> None:
    source = (PACKAGE / "text" / "template.py").read_text(encoding="utf-8")
    assert "ImmutableSandboxedEnvironment(" in source
    assert "jinja2.Environment" not in set(used(ast.parse(source)))
