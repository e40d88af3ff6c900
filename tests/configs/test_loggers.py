"""Keys of trackers are checked like all others, and a package that is missing is told before anything starts."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import yaml

from fine_tune import training_rules
from fine_tune.checks import check_resolved
from fine_tune.config import check_config
from fine_tune.errors import ConfigError

WANDB = "0123456789abcdef" * 2 + "01234567"
REFUSED = [
    ("logger.wandb.projct=x", "logger.wandb.projct: unknown key. Did you mean logger.wandb.project?"),
    ("logger.wandb.offline=maybe", "logger.wandb.offline = maybe"),
    ("logger.wandb.finish_seconds=0", "logger.wandb.finish_seconds = 0"),
    ("logger.wandb.tags=x", "logger.wandb.tags = x"),
    ("+logger.wandb.log_model=all", "logger.wandb.log_model: unknown key"),
    ("logger.wandb._target_=os.system", "logger.wandb._target_ = os.system"),
]
SECRETS = [
    f"logger.wandb.project={WANDB}", f"logger.wandb.group={WANDB}", f"logger.wandb.job_type={WANDB}",
    f"logger.wandb.entity={WANDB}", f"logger.wandb.tags=[a,{WANDB}]", "+logger.wandb.api_key=hunter2secret",
    f"+logger.wandb.name={WANDB}",
]  # fmt: skip


@pytest.mark.parametrize(("override", "sentence"), REFUSED)
def test_a_mistake_in_a_trackers_key_is_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_config(["logger=wandb", override])
    (problem,) = refused.value.problems
    assert problem.startswith(sentence)


@pytest.mark.parametrize("override", SECRETS)
def test_a_secret_in_a_trackers_key_is_refused_and_not_shown(override: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_config(["logger=wandb", override])
    assert "secret" in str(refused.value)
    assert WANDB not in str(refused.value)
    assert "hunter2secret" not in str(refused.value)


def test_group_and_the_rest_have_their_values() -> None:
    node = check_config(["logger=wandb", "logger.wandb.group=sweep-1", "logger.wandb.tags=[a,b]"]).cfg["logger"]["wandb"]
    assert node == {
        "_target_": "fine_tune.tracking.wandb_tracker.WandbTracker", "project": "fine-tune", "entity": None, "offline": False,
        "tags": ["a", "b"], "group": "sweep-1", "job_type": "train", "log_adapter": True, "init_seconds": 30.0,
        "finish_seconds": 10.0,
    }  # fmt: skip


def test_a_config_of_an_earlier_version_is_still_read() -> None:
    cfg = check_config(["logger=wandb"]).cfg
    names = ("project", "entity", "offline", "tags")
    old = {"_target_": "lightning.pytorch.loggers.WandbLogger", **{key: cfg["logger"]["wandb"][key] for key in names}}
    assert check_resolved({**cfg, "logger": {"wandb": old}}) == []


@pytest.mark.parametrize(("logger", "package"), [("wandb", "wandb"), ("tensorboard", "tensorboard")])
@pytest.mark.parametrize("namespace", [False, True])
def test_a_package_that_is_missing_is_told_at_once(
    logger: str, package: str, namespace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A folder of the package's name, such as the one wandb writes, is found too, but has no file to import.
    found = ModuleSpec(package, None) if namespace else None
    monkeypatch.setattr(training_rules, "find_spec", lambda name: found)
    with pytest.raises(ConfigError) as refused:
        check_config([f"logger={logger}"])
    assert refused.value.problems == [
        f"logger.{logger}: needs the package {package}. Run pip install {package}, or pass logger=none."
    ]
    assert check_config(["logger=csv"]).cfg["logger"]["csv"]["name"] == "csv"


def test_the_shipped_file_names_its_group_once(repository: Path) -> None:
    shipped = yaml.safe_load((repository / "conf/logger/wandb.yaml").read_text())
    assert shipped["wandb"]["group"] is None
    assert shipped["wandb"]["log_adapter"] is True
