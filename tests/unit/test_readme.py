"""What the documents say is there and works: files, options, commands, exit codes, links."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from fine_tune import errors
from fine_tune.config import check_config, find_conf_dir
from fine_tune.overrides import group_options
from fine_tune.sweeps.spec import read_sweep

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")])
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
ENTRIES = (["python", "train.py"], ["fine-tune", "train"], ["python", "-m", "fine_tune", "train"])


def blocks(text: str, language: str) -> Iterator[str]:
    yield from re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def tree() -> list[str]:
    """The paths of the README's tree; a deeper line belongs to the folder above it."""
    [found] = [block for block in blocks(README, "text") if block.startswith("train.py ")]
    paths, folders = [], [""]
    for line in found.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth + 1 :] = [folders[depth] + name]
        paths.append(folders[-1])
    return paths


def commands(file: Path) -> list[list[str]]:
    """The overrides (and flags) of every training command in a document, variables and examples in prose left out."""
    found = []
    for block in blocks(file.read_text(encoding="utf-8"), "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words[:1] == ["torchrun"]:
                    words = ["python", *words[words.index("train.py") :]]
                found += [words[len(entry) :] for entry in ENTRIES if words[: len(entry)] == entry]
    return found


COMMANDS = [(file.name, words) for file in DOCUMENTS for words in commands(file)]


def test_the_tree_names_every_python_file_once_and_nothing_else() -> None:
    named = tree()
    assert len(named) == len(set(named))
    assert [path for path in named if not (REPOSITORY / path).exists()] == []
    modules = {
        str(file.relative_to(REPOSITORY)) for file in REPOSITORY.glob("fine_tune/**/*.py") if file.stat().st_size
    }
    assert {path for path in named if path.startswith("fine_tune/") and path.endswith(".py")} == modules


def test_the_tree_names_every_folder_of_the_config() -> None:
    conf = find_conf_dir()
    groups = {f"conf/{folder.name}/" for folder in conf.iterdir() if folder.is_dir()}
    assert {path for path in tree() if path.startswith("conf/") and path != "conf/"} == groups | {"conf/train.yaml"}


def test_the_table_of_options_names_every_option_and_the_default_first() -> None:
    defaults = yaml.safe_load((find_conf_dir() / "train.yaml").read_text(encoding="utf-8"))["defaults"]
    chosen = {group: option for entry in defaults if isinstance(entry, dict) for group, option in entry.items()}
    for group, options in group_options(find_conf_dir()).items():
        [row] = re.findall(rf"^\| `{group}` \| (.*) \|$", README, flags=re.MULTILINE)
        first = str(chosen[group]).replace("${objective}", str(chosen["objective"]))
        if group == "experiment":
            assert "five studies" in row
            assert {o for o in options if f"experiment={o}" in README} == set(options)
        else:
            assert {option for option in options if f"`{option}`" in row} == set(options), group
            assert first == "None" or row.startswith(f"`{first}`"), group


def test_exit_codes_are_those_of_the_errors() -> None:
    codes = {
        int(code) for row in re.findall(r"^\| ([\d, ]+) \| ", README, flags=re.MULTILINE) for code in row.split(",")
    }
    raised = {
        found.exit_code
        for found in vars(errors).values()
        if isinstance(found, type) and issubclass(found, errors.FineTuneError) and found is not errors.FineTuneError
    }
    assert codes == raised | {0, 130, 143}


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) > 20
    assert ("README.md", []) in COMMANDS, "the first command takes no words"


@pytest.mark.parametrize(("name", "words"), COMMANDS, ids=[f"{name}: {' '.join(words)}" for name, words in COMMANDS])
def test_every_command_passes_the_checks(
    name: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = [word for word in words if not word.startswith("-")]
    (tmp_path / "my.jinja").write_text("", encoding="utf-8")
    for word in overrides:
        if word.startswith("resume="):
            folder = tmp_path / word.removeprefix("resume=")
            folder.mkdir(parents=True)
            (folder / "config.yaml").write_text(yaml.safe_dump(check_config([]).cfg), encoding="utf-8")
    if "--cfg" in words or "--help" in words:
        return  # Hydra shows something; nothing is run
    if "-m" in words:
        spec = read_sweep(overrides)
        assert spec.kind == "search" or len(spec.jobs) > 1
    else:
        assert check_config(overrides).overrides == overrides


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_every_call_from_python_passes_the_checks(file: Path) -> None:
    calls = [
        node
        for block in blocks(file.read_text(encoding="utf-8"), "python")
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "fine_tune.train"
    ]
    assert calls or file.name != "README.md"
    for call in calls:
        overrides = ast.literal_eval(call.args[0])
        assert check_config(overrides).overrides == overrides


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_every_link_and_named_test_leads_somewhere_and_the_text_is_ascii(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.isascii()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (file.parent / link).exists()] == []
    named = re.findall(r"\btests/[\w/]+\.py\b", text)
    assert [path for path in named if not (REPOSITORY / path).exists()] == []
