from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from fine_tune.errors import ConfigError, DataError, EnvironmentProblem, UnsafeArtifact
from fine_tune.evaluation import harness_tasks
from fine_tune.evaluation.harness import Harness

from .harness_files import PICK, WRITE, lines_of, subject, write_tasks

installed = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="the extra lm-eval is not installed")


def test_without_the_extra_one_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness_tasks, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"not installed\. pip install 'fine-tune\[lm-eval\]'"):
        Harness(["pick"])


def test_the_library_is_imported_only_where_it_is_asked() -> None:
    package = Path(harness_tasks.__file__).parent.parent
    first = {file.name: ast.parse(file.read_text(encoding="utf-8")).body for file in package.rglob("*.py")}
    names = {
        name: {one.module or "" for one in body if isinstance(one, ast.ImportFrom)}
        | {alias.name for one in body if isinstance(one, ast.Import) for alias in one.names}
        for name, body in first.items()
    }
    assert not [name for name, found in names.items() if any(one.split(".")[0] == "lm_eval" for one in found)]
    assert not [name for name, found in names.items() if "fine_tune.evaluation.harness_model" in found]


@pytest.fixture
def only_own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's thousands of task files take seconds to index."""
    import lm_eval.tasks

    real = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", functools.partial(real, include_defaults=False))


@installed
@pytest.mark.usefixtures("only_own_tasks")
def test_an_unknown_task_is_told_with_close_ones(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path, pick_letter=PICK)
    with pytest.raises(ConfigError) as refused:
        Harness(["pick_leter", "zzz", "pick_letter"], include_path=str(folder))
    assert refused.value.problems == [
        "eval.tasks: there is no task, group or tag 'pick_leter'. Did you mean pick_letter?",
        "eval.tasks: there is no task, group or tag 'zzz'. Pass names of lm-evaluation-harness, or eval.include_path=.",
    ]
    with pytest.raises(ConfigError, match=r"eval\.include_path=.*nowhere: no such folder"):
        Harness(["pick_letter"], include_path=str(tmp_path / "nowhere"))


@installed
def test_data_that_are_not_here_are_not_fetched(tmp_path: Path) -> None:
    away = {**PICK, "dataset_path": "someone/somewhere", "dataset_kwargs": {}}
    folder = write_tasks(tmp_path, away=away, here=PICK)
    told = r"the data of away \(someone/somewhere\) are not here .* Pass eval\.download=true once"
    with pytest.raises(EnvironmentProblem, match=told):
        Harness(["here", "away"], include_path=str(folder))
    (folder / "rows.jsonl").unlink()
    with pytest.raises(DataError, match="here cannot be loaded"):
        Harness(["here"], include_path=str(folder))


@installed
def test_offline_is_for_the_load_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import constants

    seen = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    real = datasets.load_dataset

    def load(**options: Any) -> Any:
        seen.append((constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE))
        return real(**options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    folder = str(write_tasks(tmp_path))
    Harness(["pick"], include_path=folder)
    Harness(["pick"], include_path=folder, download=True)
    assert seen == [(True, True), (False, False)]
    assert (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE) == (False, False)


CODE = (
    "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n\ndef text(doc):\n    return 'z ' + doc['q']\n"
)


def coded(folder: Path, text: str, name: str = "coded") -> str:
    """A task file with a tag or a key that plain YAML cannot write."""
    write_tasks(folder, **{name: {key: value for key, value in PICK.items() if key != "doc_to_text"}})
    (folder / "own_code.py").write_text(CODE)
    with (folder / f"{name}.yaml").open("a") as file:
        file.write(text)
    return str(folder)


@installed
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("doc_to_text: !function own_code.text\n", r"coded calls own_code\.text \(coded\.yaml\)"),
        ("doc_to_text: !<!function> own_code.text\n", r"coded calls own_code\.text"),
        ("doc_to_text: '{{q}}'\ninclude: other\n", r"coded calls own_code\.text \(other\)"),
        ("doc_to_text: '{{q}}'\nclass: !function own_code.text\n", r"coded calls own_code\.text"),
        ("doc_to_text: '{{q}}'\nclass: own_code.text\n", r"coded names a class"),
        ("doc_to_text: '{{q}}'\nunsafe_code: true\n", r"coded runs what the model wrote \(unsafe_code\)"),
    ],
)
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path, text: str, told: str) -> None:
    folder = coded(tmp_path, text)
    (tmp_path / "other").write_text("doc_to_text: !function own_code.text\n")
    with pytest.raises(UnsafeArtifact, match=told + r".*Read that code, then pass eval\.unsafe_code=true"):
        Harness(["coded"], include_path=folder)
    assert not (tmp_path / "ran").exists()


@installed
def test_code_that_was_let_in_runs(tmp_path: Path) -> None:
    folder = coded(tmp_path, "doc_to_text: !function own_code.text\n")
    lines = lines_of(Harness(["coded"], include_path=folder, unsafe_code=True), subject())
    assert lines[0]["prompt"] == "z a b a c ?"
    assert (tmp_path / "ran").exists()


@installed
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"metric_list": [{"metric": "someone/metric"}]},
            "takes the metric someone/metric and its code from elsewhere",
        ),
        ({"metric_list": [{"metric": "/anywhere/metric"}]}, "takes the metric /anywhere/metric"),
        ({"metric_list": [{"metric": "exact_match", "hf_evaluate": True}]}, "takes the metric exact_match"),
        ({"dataset_kwargs": {"trust_remote_code": True}}, r"runs its data set's code \(trust_remote_code\)"),
    ],
)
def test_code_from_elsewhere_is_refused_also_inside_groups(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    import yaml

    folder = write_tasks(tmp_path, write={**WRITE, **changes})
    with pytest.raises(UnsafeArtifact, match=told):
        Harness(["write"], include_path=str(folder))
    write_tasks(tmp_path, write=WRITE)
    (folder / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": [{"task": "write", **changes}]}))
    with pytest.raises(UnsafeArtifact, match=told):
        Harness(["both"], include_path=str(folder))


@installed
def test_the_templates_of_a_task_file_cannot_reach_python(tmp_path: Path) -> None:
    mark = tmp_path / "reached"
    reach = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}" + f"{{{{ cycler.__init__.__globals__.os.mkdir('{mark}') }}}}"
    )
    folder = write_tasks(tmp_path / "tasks", pick={**PICK, "doc_to_text": reach})
    with pytest.raises(DataError, match=r"pick cannot be loaded .*SecurityError"):
        Harness(["pick"], include_path=str(folder))
    assert not mark.exists()


@installed
def test_what_a_task_cannot_be_asked_is_told(tmp_path: Path) -> None:
    shown = {**PICK, "doc_to_image": "q"}
    folder = str(write_tasks(tmp_path, fixed={**PICK, "num_fewshot": 0}, shown=shown, free=PICK))
    with pytest.raises(ConfigError) as refused:
        Harness(["fixed", "shown", "free"], include_path=folder, num_fewshot=2)
    assert refused.value.problems == [
        "eval.num_fewshot=2: fixed is fixed to no examples. Leave it null, or the task out.",
        "eval.tasks: shown asks about images or sound. Choose tasks of text.",
    ]
    broken = str(write_tasks(tmp_path / "broken", broken={**PICK, "doc_to_text": "{{nothing}}"}))
    with pytest.raises(DataError, match=r"broken cannot be loaded .*'nothing' is undefined"):
        Harness(["broken"], include_path=broken)
