"""Words after -m become jobs, or a search, or one message with every mistake."""

from __future__ import annotations

import pytest

from fine_tune.config import check_config
from fine_tune.errors import ConfigError
from fine_tune.overrides import Varied, varied
from fine_tune.sweeps.spec import job_words, read_sweep


def problems(words: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_sweep(words)
    return caught.value.problems


def test_typed_values_make_a_grid_in_the_order_of_the_words() -> None:
    spec = read_sweep(["method.rank=4,8", "optim.lr=1e-4", "method.alpha=16,32"])
    assert spec.kind == "grid"
    assert spec.settings is None
    assert [" ".join(job) for job in spec.jobs] == [
        "method.rank=4 optim.lr=1e-4 method.alpha=16",
        "method.rank=4 optim.lr=1e-4 method.alpha=32",
        "method.rank=8 optim.lr=1e-4 method.alpha=16",
        "method.rank=8 optim.lr=1e-4 method.alpha=32",
    ]
    assert [one.key for one in spec.varied] == ["method.rank", "method.alpha"]


def test_a_named_sweep_brings_values_and_typed_ones_replace_them() -> None:
    assert len(read_sweep(["sweep=rank_alpha"]).jobs) == 6
    spec = read_sweep(["sweep=rank_alpha", "method.rank=2", "optim.lr=1e-4"])
    assert sorted(map(sorted, spec.jobs)) == [
        ["method.alpha=16", "method.rank=2", "optim.lr=1e-4"],
        ["method.alpha=32", "method.rank=2", "optim.lr=1e-4"],
    ]


@pytest.mark.parametrize("name", ["rank_alpha", "lr", "rank_targets"])
def test_shipped_grids_are_valid(name: str) -> None:
    spec = read_sweep([f"sweep={name}"])
    assert spec.kind == "grid"
    assert len(spec.jobs) > 3


def test_the_shipped_beta_sweep_is_valid_for_preferences() -> None:
    assert len(read_sweep(["sweep=dpo_beta", "objective=dpo"]).jobs) == 4
    assert any("objective.beta" in problem for problem in problems(["sweep=dpo_beta"]))


def test_a_job_has_no_trace_of_the_sweep() -> None:
    """So that the run is the same, and named the same, as without it."""
    spec = read_sweep(["sweep=rank_alpha"])
    alone = check_config(["method.rank=8", "method.alpha=16", "sweep_dir=runs"], multirun=True).cfg
    assert check_config([*spec.jobs[0], "sweep_dir=runs"], multirun=True).cfg == alone


def test_the_folder_is_named_by_what_is_swept() -> None:
    name = read_sweep(["method.rank=4,8", "sweep_dir=a"]).name
    assert read_sweep(["method.rank=4,8", "sweep_dir=b", "overwrite=true", "logger=csv"]).name == name
    assert read_sweep(["method.rank=4,16"]).name != name
    search = read_sweep(["sweep=optuna", "sweep.num_trials=5"]).name
    assert read_sweep(["sweep=optuna", "sweep.num_trials=50"]).name == search
    assert read_sweep(["sweep=optuna", "sweep.seed=3"]).name != search


def test_a_search_reads_ranges() -> None:
    found = varied(["a.b=tag(log,interval(1e-5,1e-3))", "c=int(interval(1,9))", "d=choice(x,y)", "e=range(1,4)", "f=3"])
    assert found == [
        Varied("a.b", (), 1e-5, 1e-3, log=True),
        Varied("c", (), 1.0, 9.0, whole=True),
        Varied("d", ("x", "y")),
        Varied("e", ("1", "2", "3")),
    ]
    spec = read_sweep(["sweep=optuna", "method.rank=4,8"])
    assert spec.kind == "search"
    assert spec.jobs == []
    assert {one.key: one.values for one in spec.varied} == {"optim.lr": (), "method.rank": ("4", "8")}


def test_words_of_a_trial() -> None:
    words = ["optim.lr=tag(log,interval(1e-5,1e-3))", "+method.rank=4,8", "seed=1"]
    assert job_words(words, {"optim.lr": "0.0002", "method.rank": "8"}) == ["optim.lr=0.0002", "method.rank=8", "seed=1"]


def test_every_mistake_of_every_job_is_told_before_anything_starts() -> None:
    found = "\n".join(problems(["method.rank=0,8", "optim.lrr=3,4"]))
    assert "method.rank = 0" in found
    assert "optim.lrr: unknown key" in found
    # Also one that only a search's other values have.
    assert any("method.rank = 0" in text for text in problems(["sweep=optuna", "method.rank=8,0"]))
    assert any("optim.lr" in text and "-1" in text for text in problems(["sweep=optuna", "optim.lr=interval(-1,1e-3)"]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.lr=interval(1e-5,1e-3)"], "a grid has no values for it"),
        (["sweep=optuna", "optim.lr=interval(3,1)"], "must go up"),
        (["sweep=optuna", "optim.lr=tag(log,interval(0,1))"], "from above 0"),
        (["sweep=optuna", "sweep.metric=speed"], "no such metric"),
        (["sweep=optuna", "sweep.pruner=null"], "sweep.pruner: no value"),
        (["trainer.num_workers=0,2"], "the same run as trainer.num_workers=0"),
        (["method.rank=8,8"], "the same run"),
        (["sweep_dir=a,b"], "one folder holds the runs"),
        (["method.rank=shuffle(4,8)"], "their order must be the same"),
        (["sweep=rank_alfa"], "Did you mean sweep=rank_alpha"),
        (["run_dir=x", "method.rank=4,8"], "one folder cannot hold the runs of a sweep"),
        (["logger.wandb.api_key=abc", "method.rank=4,8"], "secret"),
    ],
)
def test_mistakes(words: list[str], said: str) -> None:
    assert any(said in problem for problem in problems(words)), problems(words)


@pytest.mark.parametrize("word", ["sweep=rank_alpha", "sweep.num_trials=3"])
def test_a_sweep_needs_its_flag(word: str) -> None:
    with pytest.raises(ConfigError, match="sweep: only with -m"):
        check_config([word])
