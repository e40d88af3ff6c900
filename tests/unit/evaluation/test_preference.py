"""Preference accuracy against each completion scored alone, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fine_tune.data.prepare import PrepareSpec, prepare
from fine_tune.data.table import TokenTable
from fine_tune.errors import ConfigError, DataError, NonFiniteError
from fine_tune.evaluation.preference import Preference, judge, length_bucket, longer_side
from fine_tune.evaluation.protocol import Subject
from fine_tune.evaluation.scored_rows import ScoredRow
from fine_tune.models.adapter import adapter_off
from fine_tune.text.pairs import EncodedPair

from ..modules.conftest import exact_norm as exact_norm
from .speaking import network, reference_logps, run, state_of, subject, template, tokenizer, write_rows

EXACT = 1e-9


@pytest.fixture
def spec(tmp_path: Path) -> PrepareSpec:
    rows = [
        {"prompt": f"question {n}", "chosen": "y" * (1 + n % 7) + f"{n}", "rejected": "no " * (1 + n % 5) + "."}
        for n in range(60)
    ]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    return PrepareSpec("preferences", path, cache_dir=str(tmp_path / "cache"), val_share=0.4)


@pytest.fixture
def exact(exact_norm: None) -> Subject:
    return subject(network(dtype=torch.float64, peak=4.0))


def alone(model: torch.nn.Module, table: TokenTable, index: int) -> list[float]:
    """Sum each completion's log-probabilities from a plain sequence of its own."""
    ids, _ = table.row(index)
    first, second = table.branches(index)
    found = []
    for completion in (ids[first:second], ids[second:]):
        whole = [*ids[:first].tolist(), *completion.tolist()]
        found.append(float(reference_logps(model, whole)[first - 1 :].sum()))
    return found


@pytest.mark.parametrize("size", [1, 100, pytest.param(10**6, marks=pytest.mark.drill)])
def test_every_number_equals_a_completion_scored_alone(spec: PrepareSpec, exact: Subject, size: int) -> None:
    evaluation = Preference(spec, micro_batch_tokens=size, head_chunk_tokens=5)
    before = state_of(exact)
    lines = run(evaluation, exact)
    assert state_of(exact) == before
    table = prepare(spec, tokenizer(), template()).val
    right: dict[str, list[float]] = {"sum": [], "mean": [], "reward": []}
    for index, line in enumerate(lines):
        policy = alone(exact.network, table, index)
        with adapter_off(exact.network):
            base = alone(exact.network, table, index)
        assert [line["logps"][side] for side in ("chosen", "rejected")] == pytest.approx(policy, abs=EXACT)
        assert [line["logps"][f"base_{side}"] for side in ("chosen", "rejected")] == pytest.approx(base, abs=EXACT)
        tokens = line["tokens"]
        right["sum"].append(float(policy[0] > policy[1]))
        right["mean"].append(float(policy[0] / tokens["chosen"] > policy[1] / tokens["rejected"]))
        margin = policy[0] - base[0] - (policy[1] - base[1])
        assert line["margin"] == pytest.approx(margin, abs=EXACT)
        right["reward"].append(float(margin > 0))
    for rule, values in right.items():
        assert [line[f"by_{rule}"] for line in lines] == values
        assert 0 < sum(values) < len(values), "the rule must not be constant here"
    # The three judge differently, so that none can stand in for another.
    assert right["sum"] != right["mean"] != right["reward"] != right["sum"]
    metrics = evaluation.metrics(lines)
    for rule, name in (("sum", "accuracy_sum"), ("mean", "accuracy_mean"), ("reward", "reward_accuracy")):
        assert metrics[name] == pytest.approx(sum(right[rule]) / len(lines))


def test_the_base_and_a_whole_model_have_no_reward(spec: PrepareSpec, exact: Subject) -> None:
    base = run(Preference(spec), subject(exact.network, base=True))
    tuned = run(Preference(spec), exact)
    whole = subject(network(dtype=torch.float64, peak=4.0).get_base_model())  # type: ignore[operator]
    for name, parameter in whole.network.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    bare = run(Preference(spec), whole)
    for lines in (base, bare):
        assert all(line["by_reward"] is None and line["margin"] is None for line in lines)
        assert set(lines[0]["logps"]) == {"chosen", "rejected"}
        metrics = Preference(spec).metrics(lines)
        assert (metrics["reward_accuracy"], metrics["mean_margin_nats"]) == (None, None)
    for a, b, c in zip(base, tuned, bare, strict=True):
        assert a["logps"]["chosen"] == pytest.approx(b["logps"]["base_chosen"], abs=EXACT)
        assert a["logps"]["chosen"] == pytest.approx(c["logps"]["chosen"], abs=EXACT)


@pytest.mark.parametrize("by", ["sum", "mean", "reward"])
def test_checkpoints_are_compared_by_the_named_judgement(spec: PrepareSpec, exact: Subject, by: str) -> None:
    lines = run(Preference(spec, by=by), exact)
    assert [line["score"] for line in lines] == [line[f"by_{by}"] for line in lines]
    assert [line["correct"] for line in lines] == [line["score"] == 1.0 for line in lines]
    base = run(Preference(spec, by=by), subject(exact.network, base=True))
    assert (by == "reward") == all(line["score"] == 0.5 and line["correct"] is None for line in base)


def test_one_pair_by_hand() -> None:
    assert judge((-6.0, -5.0), (-9.0, -4.0), (3, 2)) == {"sum": 0.0, "mean": 1.0, "reward": 1.0}
    assert judge((-6.0, -6.0), (-5.0, -5.0), (3, 3)) == {"sum": 0.5, "mean": 0.5, "reward": 0.5}
    assert judge((-1.0, -6.0), None, (1, 9))["reward"] is None
    with pytest.raises(NonFiniteError, match="not numbers"):
        judge((float("nan"), -1.0), None, (1, 1))


@pytest.mark.parametrize(
    ("tokens", "bucket", "side"),
    [
        ((1, 1), "1-16 tokens", "same length"), ((16, 3), "1-16 tokens", "chosen longer"),
        ((3, 17), "17-32 tokens", "rejected longer"), ((1024, 1), "513-1024 tokens", "chosen longer"),
        ((1, 1025), "1025 tokens or more", "rejected longer"),
    ],
)  # fmt: skip
def test_buckets_by_hand(tokens: tuple[int, int], bucket: str, side: str) -> None:
    assert (length_bucket(*tokens), longer_side(*tokens)) == (bucket, side)


def line(tokens: tuple[int, int], by_sum: float, reward: float | None) -> dict[str, Any]:
    return {
        "by_sum": by_sum, "by_mean": 1.0, "by_reward": reward, "margin": reward,
        "tokens": dict(zip(("chosen", "rejected"), tokens, strict=True)),
        "group": length_bucket(*tokens), "longer": longer_side(*tokens),
    }  # fmt: skip


def test_metrics_by_length_and_by_side() -> None:
    evaluation = Preference(PrepareSpec("world"))
    lines = [line((40, 20), 0.0, 1.0), line((4, 9), 1.0, 0.5), line((9, 4), 0.0, 0.0), line((9, 16), 1.0, 1.0)]
    found = evaluation.metrics(lines)
    assert (found["accuracy_sum"], found["reward_accuracy"], found["mean_margin_nats"]) == (0.5, 0.625, 0.625)
    assert list(found["by_length"]) == ["1-16 tokens", "33-64 tokens"]
    assert found["by_length"]["1-16 tokens"] == {
        "num_items": 3, "accuracy_sum": 2 / 3, "accuracy_mean": 1.0, "reward_accuracy": 0.5
    }  # fmt: skip
    assert found["by_longer_side"]["chosen longer"]["accuracy_sum"] == 0.0
    assert found["by_longer_side"]["rejected longer"]["accuracy_sum"] == 1.0
    assert [evaluation.groups(one) for one in lines[:2]] == ["33-64 tokens", "1-16 tokens"]


def test_what_is_no_pair_is_refused(spec: PrepareSpec, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval\.by=margin: unknown. Choose one of sum, mean, reward"):
        Preference(spec, by="margin")
    rows = [{"instruction": f"q {n}", "output": "a"} for n in range(20)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ConfigError, match="the data are no preference pairs"):
        Preference(PrepareSpec("instructions", path, cache_dir=str(tmp_path), val_share=0.5)).prepare(
            tokenizer(), template()
        )
    nothing = PrepareSpec("preferences", spec.path, cache_dir=str(tmp_path), val_share=0.0)
    with pytest.raises(DataError, match=r"data\.val_share=0\.0: no validation pair"):
        Preference(nothing).prepare(tokenizer(), template())


def test_the_digest_of_a_pair_holds_its_tokens_and_where_they_divide() -> None:
    def digest(ids: list[int], *branches: int) -> str:
        encoded = EncodedPair(ids[: branches[0]], ids[branches[0] : branches[1]], ids[branches[1] :])
        return ScoredRow("a", "shown", 0, TokenTable.from_rows([("a", encoded)])).digest

    assert digest([1, 2, 3, 4], 1, 2) == digest([1, 2, 3, 4], 1, 2)
    assert len({digest([1, 2, 3, 4], 1, 2), digest([1, 2, 3, 4], 1, 3), digest([1, 2, 3, 5], 1, 2)}) == 3


def test_hostile_text_stays_data(tmp_path: Path) -> None:
    hostile = '<|end|></s><script>x</script>\x1b[31m\u202e[b]"'
    rows = [{"prompt": f"{hostile} {n}", "chosen": f"{hostile} yes", "rejected": "no"} for n in range(8)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    lines = run(Preference(PrepareSpec("preferences", path, cache_dir=str(tmp_path), val_share=0.5)), subject())
    assert lines
    # The text is spelled out, character by character, and closed by one end of turn.
    assert all(line["tokens"]["chosen"] == len(f"{hostile} yes") + 1 for line in lines)
