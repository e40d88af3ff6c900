"""Going on with a run: its own config, and only the changes that do not touch what it computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fine_tune.checks import check_resolved
from fine_tune.config import check_config, resumed_config
from fine_tune.errors import ConfigError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with the config of a run that is not the default one."""
    cfg = check_config(["method.rank=4", "seed=9", "callbacks.preview.every_n_steps=7"]).cfg
    folder = tmp_path / "first"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg))
    return folder


def problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        check_config(overrides)
    return refused.value.problems


def test_the_saved_config_is_the_base(run: Path) -> None:
    cfg = check_config([f"resume={run}"]).cfg
    assert (cfg["method"]["rank"], cfg["seed"], cfg["resume"]) == (4, 9, str(run))
    assert check_resolved(cfg) == []


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("trainer.max_steps=600", ("trainer", "max_steps"), 600),
        ("trainer.num_workers=2", ("trainer", "num_workers"), 2),
        ("trainer.accelerator=cpu", ("trainer", "accelerator"), "cpu"),
        ("trainer.micro_batch_tokens=8192", ("trainer", "micro_batch_tokens"), 8192),
        ("trainer.speed=lean", ("trainer", "speed"), "lean"),
        ("callbacks.preview.every_n_steps=50", ("callbacks", "preview", "every_n_steps"), 50),
        ("logger=csv", ("logger", "csv", "name"), "csv"),
    ],
)
def test_what_may_change_changes(run: Path, override: str, path: tuple[str, ...], value: object) -> None:
    cfg = resumed_config([f"resume={run}", override]).cfg
    found = cfg
    for key in path:
        found = found[key]
    assert found == value
    assert cfg["method"]["rank"] == 4


def test_a_run_from_before_a_key_existed_goes_on(run: Path) -> None:
    file = run / "config.yaml"
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join(line for line in lines if "dense_base" not in line), encoding="utf-8")
    assert check_config([f"resume={run}"]).cfg["trainer"]["dense_base"] is None


def test_the_length_may_be_given_in_the_other_unit(run: Path) -> None:
    trainer = check_config([f"resume={run}", "trainer.max_epochs=2"]).cfg["trainer"]
    assert (trainer["max_steps"], trainer["max_epochs"]) == (None, 2)


@pytest.mark.parametrize(
    "override",
    [
        "method.rank=8",
        "optim.lr=1e-5",
        "model=qwen",
        "seed=1",
        "init_from=runs/a",
        "run_dir=x",
        "data.max_seq_len=128",
        "optim.global_batch_size=4",
        "trainer.precision=bf16-mixed",
        "overwrite=true",
        "experiment=phi2_oasst1",
    ],
)
def test_nothing_else_may_change(run: Path, override: str) -> None:
    [sentence] = problems(f"resume={run}", override)
    assert sentence.startswith(f"{override.partition('=')[0]}: cannot change when a run goes on")


def test_typos_and_bad_values_are_reported_together(run: Path) -> None:
    found = problems(f"resume={run}", "trainer.max_stepz=5", "trainer.num_workers=-1", "method.rank=8")
    assert len(found) == 3
    assert any("trainer.max_steps" in sentence for sentence in found)
    assert any("trainer.num_workers = -1: must be >= 0" in sentence for sentence in found)


def test_a_saved_config_is_data_and_is_never_interpolated(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", "leaked")
    cfg = yaml.safe_load((run / "config.yaml").read_text())
    cfg["init_from"] = "${oc.env:CANARY}"
    cfg["callbacks"]["preview"]["prompts"] = ["${oc.env:CANARY}"]
    (run / "config.yaml").write_text(yaml.safe_dump(cfg))
    assert "leaked" not in str(check_config([f"resume={run}", "trainer.max_steps=600"]).cfg)


@pytest.mark.parametrize(
    ("change", "contained"),
    [
        ({"optim": {"_target_": "os.system"}}, "optim._target_ = os.system"),
        ({"method": {"rank": "8"}}, "method.rank = 8"),
        ({"extra": {"a": 1}}, "extra: unknown key"),
        ({"callbacks": {"evil": {"_target_": "subprocess.run"}}}, "callbacks.evil._target_ = subprocess.run"),
    ],
)
def test_a_tampered_config_is_refused(
    run: Path, change: dict[str, dict[str, object]], contained: str
) -> None:
    cfg = yaml.safe_load((run / "config.yaml").read_text())
    for group, values in change.items():
        cfg.setdefault(group, {}).update(values)
    (run / "config.yaml").write_text(yaml.safe_dump(cfg))
    [sentence] = problems(f"resume={run}")
    assert contained in sentence


@pytest.mark.parametrize("text", ["- a list", "{broken", "!!python/object/apply:os.system ['true']"])
def test_an_unreadable_config_is_refused(run: Path, text: str) -> None:
    (run / "config.yaml").write_text(text)
    [sentence] = problems(f"resume={run}")
    assert "cannot be read" in sentence


def test_resumed_config_needs_a_run() -> None:
    with pytest.raises(ConfigError, match=r"resume: no value. Pass resume=<run folder>"):
        resumed_config(["trainer.max_steps=5"])
