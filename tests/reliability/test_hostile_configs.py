"""Configs that somebody else wrote are data: nothing in them is imported, called, read from the environment, or expanded."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from fine_tune import safe_load
from fine_tune.config import check_config
from fine_tune.errors import CheckpointError, ConfigError, UnsafeArtifact
from fine_tune.evaluation_config import check_evaluation
from fine_tune.pushing.facts import read_facts
from fine_tune.report.reading import read_run
from fine_tune.subjects import find

from .hostile import PATHS, YAML

TARGETS = [
    "os.system", "posix.system", "os.popen", "builtins.eval", "builtins.exec", "subprocess.run", "subprocess.Popen",
    "pathlib.Path.touch", "pathlib.Path.unlink", "shutil.rmtree", "importlib.import_module", "pickle.loads", "torch.load",
    "torch.hub.load", "urllib.request.urlopen", "hydra.utils.instantiate", "fine_tune.targets.build", "runpy.run_path",
]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_a_hostile_target_is_refused_wherever_it_stands(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary"
    node = f"{{_target_:{target},path:canary,command:'touch canary',args:['touch canary']}}"
    for word in (
        f"+callbacks.x={node}",
        f"+logger.x={node}",
        f"optim._target_={target}",
        f"+callbacks.x={{_target_:lightning.pytorch.callbacks.Timer,duration:[{node}]}}",
        f"+callbacks.x={{_target_:lightning.pytorch.callbacks.Timer,_partial_:true,interval:{node}}}",
    ):
        with pytest.raises(ConfigError) as refused:
            check_config([word])
        assert "_target_" in str(refused.value)
    # An interpolation is resolved first, and then it is what it says.
    with pytest.raises(ConfigError, match="not on the list of classes"):
        check_config([f"data.name={target}", "optim._target_=${data.name}"])
    assert not canary.exists()


@pytest.mark.parametrize("word", ["hydra.launcher._target_=os.system", "hydra.launcher.n_jobs={_target_:os.system}",
                                  "hydra.launcher.x._target_=os.system", "hydra.sweeper._target_=os.system",
                                  "hydra.callbacks.x={_target_:os.system}", "hydra.searchpath=[file:///x]",
                                  "hydra.job_logging.x=1", "hydra/job_logging=x"])  # fmt: skip
def test_nothing_of_hydras_own_names_a_class(word: str) -> None:
    for words in ([word], ["-m", word]):
        with pytest.raises(ConfigError):
            check_config([w for w in words if w != "-m"], multirun="-m" in words)


@pytest.mark.parametrize("text", ["${oc.env:HF_TOKEN}", "${oc.env:HOME}", "${oc.decode:x}", "${hydra:runtime.cwd}",
                                  "a${oc.env:HF_TOKEN,x}b", "${oc.env:${oc.env:HOSTNAME}}"])  # fmt: skip
def test_a_config_reads_no_secret_of_the_environment(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-value-that-must-not-show")
    with pytest.raises(ConfigError) as refused:
        check_config([f"model.name='{text}'"])
    assert "a-value-that-must-not-show" not in str(refused.value)


@pytest.fixture(scope="module")
def saved() -> str:
    return yaml.safe_dump(check_config([]).cfg)


@pytest.mark.parametrize("name", YAML)
def test_a_hostile_config_of_a_run_is_refused_in_no_time(name: str, saved: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "eval" / "x").mkdir(parents=True)
    (run / "eval" / "x" / "metrics.json").write_text('{"metrics": {"a": 1}}')
    # Also inside a group that is read.
    inside = saved.replace("trainer:\n", "trainer:\n" + "".join(f"  {line}\n" for line in YAML[name].splitlines()), 1)
    for text in (saved + YAML[name], inside):
        (run / "config.yaml").write_text(text)
        started = time.monotonic()
        with pytest.raises(ConfigError, match=r"its config\.yaml cannot be read"):
            check_config([f"resume={run}"])
        with pytest.raises(CheckpointError, match=r"config\.yaml"):
            find([str(run)], check_evaluation(["ckpt=base"]))
        with pytest.raises(CheckpointError, match=r"config\.yaml"):
            read_facts(run, None)
        assert read_run(run).damaged == ["config.yaml: damaged, shown as it stands"]
        assert time.monotonic() - started < 20


def test_yaml_of_ours_is_nowhere_near_the_limits(saved: str) -> None:
    assert safe_load.yaml_text(saved) == check_config([]).cfg
    assert len(saved) * 50 < safe_load.MAX_CHARACTERS
    shared = [1, 2]
    assert safe_load.yaml_text(yaml.safe_dump({"a": shared, "b": shared})) == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize("name", PATHS)
def test_the_name_of_a_run_is_no_path(name: str) -> None:
    quoted = name.replace("\\", "\\\\").replace("'", "\\'")
    with pytest.raises(ConfigError, match="run_name"):
        check_config([f"run_name='{quoted}'"])


def test_code_that_a_runs_own_config_asks_for_is_asked_of_the_user(saved: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "adapter_model.safetensors").touch()
    cfg = yaml.safe_load(saved)
    cfg["model"] |= {"path": "owner/name", "revision": "0" * 40, "trust_remote_code": True}
    (run / "config.yaml").write_text(yaml.safe_dump(cfg))
    defaults = check_evaluation(["ckpt=base"])
    for words in ([str(run)], ["base", str(run)]):
        with pytest.raises(UnsafeArtifact, match=r"owner/name .*pass model\.trust_remote_code=true"):
            find(words, defaults)
    allowed = check_evaluation(["ckpt=base", "model.trust_remote_code=true"])
    assert find([str(run)], allowed)[0].cfg["model"]["trust_remote_code"] is True
    with pytest.raises(ConfigError, match=r"resume = .*pass model\.trust_remote_code=true"):
        check_config([f"resume={run}"])
    assert check_config([f"resume={run}", "model.trust_remote_code=true"]).cfg["model"]["revision"] == "0" * 40
