"""Better, worse, or cannot tell: planted differences, no difference, and items that do not match."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from rich.console import Console

from fine_tune.evaluating import judge
from fine_tune.evaluation.perplexity import Perplexity
from fine_tune.evaluation.record import Result
from fine_tune.evaluation.verdict import Verdict, compare, verdict_table

from .verdict_lines import Lines, by_correct, lines


def subject(line: dict[str, Any]) -> str | None:
    return str(line["subject"])


def shown(verdict: Verdict, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(verdict_table(verdict))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


def planted(right_to_wrong: int, wrong_to_right: int, right: int = 100, wrong: int = 100) -> tuple[Lines, Lines]:
    before = [True] * (right_to_wrong + right) + [False] * (wrong_to_right + wrong)
    after = [False] * right_to_wrong + [True] * right + [True] * wrong_to_right + [False] * wrong
    return lines(before), lines(after)


def test_a_planted_regression_is_worse_and_its_flips_are_listed() -> None:
    verdict = by_correct(*planted(14, 2, right=100, wrong=84)).named("base", "dpo")
    assert verdict.word == "worse"
    assert verdict.lost == tuple(f"q{i}" for i in range(14))
    assert verdict.gained == ("q114", "q115")
    assert verdict.p == pytest.approx(2 * (1 + 16 + 120) / 2**16, rel=1e-12)
    assert (verdict.mean_a, verdict.mean_b, verdict.difference) == (114 / 200, 102 / 200, pytest.approx(-0.06))
    assert verdict.interval is not None
    assert verdict.interval == pytest.approx((-0.105, -0.025), abs=0.0101)
    assert verdict.sentence == (
        "worse: dpo answers 12 fewer of 200 items right than base (2 gained, 14 lost; exact McNemar p = 0.0042)"
    )
    assert verdict.more_items is None


def test_the_other_way_round_it_is_better() -> None:
    before, after = planted(14, 2, right=100, wrong=84)
    forth, back = by_correct(before, after), by_correct(after, before)
    assert back.word == "better"
    assert (back.gained, back.lost) == (forth.lost, forth.gained)
    assert (back.p, back.difference) == (forth.p, -forth.difference)
    assert "answers 12 more of 200 items right" in back.sentence


def test_an_unpaired_test_would_miss_the_planted_regression() -> None:
    # Negative control: 57 % against 51 % of 200 is nothing to a test that does not know the pairs.
    stats = pytest.importorskip("scipy.stats")
    assert stats.fisher_exact([[114, 86], [102, 98]]).pvalue > 0.2
    # The same shares with the flips spread wide are indeed no evidence, and the paired test says so.
    scattered = by_correct(*planted(60, 48, right=54, wrong=38))
    assert (scattered.mean_a, scattered.mean_b) == (114 / 200, 102 / 200)
    assert scattered.word == "cannot tell"


@pytest.mark.parametrize("values", [[True] * 50, [False] * 50, [True, False] * 25])
def test_two_identical_models_cannot_be_told_apart(values: list[bool]) -> None:
    verdict = by_correct(lines(values), lines(values), group_of=subject).named("sft", "sft-2")
    assert (verdict.word, verdict.p, verdict.gained, verdict.lost) == ("cannot tell", 1.0, (), ())
    assert (verdict.more_items, verdict.interval) == (None, None)
    assert verdict.sentence == (
        "cannot tell with 50 items: sft-2 answers as many of 50 items right as sft (0 gained, 0 lost; exact McNemar "
        "p = 1); this leaves nothing to estimate from how many more would be needed"
    )
    assert [group.word for group in verdict.groups] == ["cannot tell"]


def test_identical_scores_cannot_be_told_apart() -> None:
    scores = lines(np.random.default_rng(0).random(40).tolist(), "score")
    verdict = compare(scores, scores, field="score", better="higher")
    assert (verdict.word, verdict.p, verdict.difference, verdict.more_items) == ("cannot tell", 1.0, 0.0, None)
    assert "mean score of the second is the same as that of the first" in verdict.sentence


def test_a_score_is_called_what_it_is() -> None:
    scores = np.random.default_rng(0).random(40)
    verdict = compare(lines(scores.tolist(), "score"), lines((scores - 0.25).tolist(), "score"), field="score", better="lower")
    said = verdict.named("base", "sft").calling(Perplexity.score_is).sentence
    assert said.startswith("better: mean nats per token of sft is 0.25 lower than that of base over 40 items (")
    assert "score" not in said
    assert verdict.calling("a\x1b[31mb").sentence.startswith("better: mean a [31mb of ")


def test_a_small_difference_says_how_many_more_items_it_would_take() -> None:
    verdict = by_correct(*planted(6, 12, right=91, wrong=91)).named("sft", "dpo")
    assert verdict.word == "cannot tell"
    # 830 in all have the power for this effect (see the test of the number itself); 200 are there.
    assert verdict.more_items == 630
    assert verdict.sentence == (
        "cannot tell with 200 items: dpo answers 6 more of 200 items right than sft (12 gained, 6 lost; exact McNemar "
        "p = 0.24); about 630 more would be needed to find such a difference 80 % of the time"
    )


def test_the_number_in_the_sentence_is_rounded_up_to_two_digits() -> None:
    verdict = by_correct(*planted(100, 107, right=396, wrong=397))
    assert verdict.more_items is not None
    assert verdict.more_items > 10_000
    stated = int(verdict.sentence.split("about ")[1].split(" more")[0].replace(",", ""))
    assert verdict.more_items <= stated < 1.1 * verdict.more_items
    assert stated % 10 ** (len(str(stated)) - 2) == 0


def test_nothing_and_one_pair() -> None:
    empty = by_correct([], [])
    assert (empty.word, empty.num_items, empty.p, empty.more_items) == ("cannot tell", 0, 1.0, None)
    assert empty.sentence.startswith("cannot tell with 0 items: ")
    one = by_correct(lines([False]), lines([True]))
    assert (one.word, one.p, one.gained, one.more_items) == ("cannot tell", 1.0, ("q0",), 5)
    assert one.sentence.startswith("cannot tell with 1 item: the second answers 1 more of 1 item right")
    single = compare(lines([0.0], "score"), lines([9.0], "score"), field="score", better="higher")
    assert (single.word, single.p, single.interval, single.more_items) == ("cannot tell", 1.0, None, None)
    discordant = by_correct(*planted(0, 1))
    assert (discordant.word, discordant.p) == ("cannot tell", 1.0)
    assert discordant.more_items is not None
    assert discordant.more_items > 1000


def test_five_items_never_decide_though_the_bootstrap_alone_would() -> None:
    a, b = lines([0.0] * 5, "score"), lines([0.8, 0.9, 1.0, 1.1, 1.2], "score")
    verdict = compare(a, b, field="score", better="higher")
    assert verdict.interval is not None
    assert verdict.interval[0] > 0.8
    assert (verdict.word, verdict.p, verdict.more_items) == ("cannot tell", 2 / 32, 1)


def test_one_bad_loss_among_small_gains_is_vetoed_by_the_interval() -> None:
    a, b = lines([0.0] * 34, "score"), lines([1.0] * 33 + [-9.0], "score")
    verdict = compare(a, b, field="score", better="higher")
    assert verdict.p < 0.05
    assert verdict.interval is not None
    assert verdict.interval[0] < 0 < verdict.interval[1]
    assert (verdict.word, verdict.difference) == ("cannot tell", pytest.approx(24 / 34))
    assert verdict.more_items is not None


def scores() -> tuple[Lines, Lines]:
    rng = np.random.default_rng(3)
    item = rng.normal(2.0, 3.0, 80)
    return lines(item.tolist(), "nll"), lines((item - 0.2 + rng.normal(0, 0.4, 80)).tolist(), "nll")


def test_scores_are_compared_item_by_item() -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = scores()
    verdict = compare(a, b, field="nll", better="lower").named("base", "sft")
    low, high = verdict.interval or (0.0, 0.0)
    assert verdict.word == "better"
    assert low < verdict.difference < high < 0
    assert verdict.p < 0.001
    assert (verdict.gained, verdict.lost) == ((), ())
    assert verdict.num_gained + verdict.num_lost == 80
    assert verdict.num_gained > verdict.num_lost
    assert verdict.sentence == (
        f"better: mean nll of sft is {-verdict.difference:.3g} lower than that of base over 80 items "
        f"(95 % interval {low:.3g} to {high:.3g}, sign-flip p = {verdict.p:.2g})"
    )
    # Where higher is better the same numbers are a regression; without the pairs they are nothing.
    assert compare(a, b, field="nll", better="higher").word == "worse"
    assert stats.ttest_ind([line["nll"] for line in a], [line["nll"] for line in b]).pvalue > 0.5


def test_scores_too_close_say_how_many_more_are_needed() -> None:
    a, b = scores()
    verdict = compare(a[:12], b[:12], field="nll", better="lower")
    differences = np.array([y["nll"] - x["nll"] for x, y in zip(a[:12], b[:12], strict=True)])
    assert verdict.word == "cannot tell"
    expected = ((1.959964 + 0.841621) * differences.std(ddof=1) / differences.mean()) ** 2 + 1.959964**2 / 2
    assert verdict.more_items == math.ceil(expected) - 12
    assert f"about {verdict.more_items:,} more" in verdict.sentence or verdict.more_items >= 100


def test_lower_is_better_for_true_and_false_too() -> None:
    a, b = lines([True] * 8 + [False] * 4, "cut_off"), lines([False] * 12, "cut_off")
    verdict = compare(a, b, field="cut_off", better="lower").named("base", "sft")
    assert (verdict.word, verdict.num_gained, verdict.num_lost) == ("better", 8, 0)
    assert verdict.sentence.startswith("better: sft has cut_off in 8 fewer of 12 items than base (8 gained")


def test_groups_are_adjusted_over_all_of_them() -> None:
    before, after = lines([False] * 28, groups=4), lines([False] * 28, groups=4)
    for line in after:
        # Subject s0 gains all 7 items, s1 gains 6; alone both are significant, among four only s0 is nearly.
        line["correct"] = line["subject"] == "s0" or (line["subject"] == "s1" and line["id"] != "q1")
    verdict = by_correct(before, after, group_of=subject)
    assert [group.name for group in verdict.groups] == ["s0", "s1", "s2", "s3"]
    assert [group.p for group in verdict.groups] == [2 / 2**7, 2 / 2**6, 1.0, 1.0]
    assert [group.adjusted_p for group in verdict.groups] == pytest.approx([8 / 2**7, 6 / 2**6, 1.0, 1.0])
    assert [group.word for group in verdict.groups] == ["cannot tell"] * 4
    assert (verdict.word, verdict.num_gained) == ("better", 13)
    two = by_correct(before, after, group_of=lambda line: line["subject"] if line["subject"] in ("s0", "s3") else None)
    assert [(group.name, group.word, group.num_items) for group in two.groups] == [
        ("s0", "better", 7),
        ("s3", "cannot tell", 7),
    ]


def test_the_seed_decides_the_resamples_and_nothing_else() -> None:
    a, b = scores()
    first, again, other = (compare(a, b, field="nll", better="lower", seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.interval != other.interval
    assert (first.word, first.difference) == (other.word, other.difference)


def test_plain_values_survive_json() -> None:
    verdict = by_correct(*planted(14, 2), group_of=subject).named("base", "dpo")
    plain = verdict.as_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["sentence"] == verdict.sentence
    assert plain["word"] == "worse"
    assert plain["lost"] == [f"q{i}" for i in range(14)]
    assert plain["names"] == ["base", "dpo"]
    assert plain["groups"][0]["adjusted_p"] == verdict.p


def test_the_table_shows_the_sentence_all_items_and_each_group() -> None:
    text = shown(by_correct(*planted(14, 2, right=100, wrong=84), group_of=subject).named("base", "dpo"))
    assert "worse: dpo answers 12 fewer of 200 items right than base" in text
    rows = [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in text.splitlines() if "57.0 %" in line]
    assert rows == [
        ["all", "200", "57.0 %", "51.0 %", "2", "14", "0.0042", "", "worse"],
        ["s0", "200", "57.0 %", "51.0 %", "2", "14", "0.0042", "0.0042", "worse"],
    ]


def test_hostile_names_are_inert() -> None:
    hostile = "[red]x[/red]\x1b[31m\u202e\n<script>"
    a, b = lines([True] * 3), lines([False] * 3)
    for line in (*a, *b):
        line["subject"] = hostile
    verdict = by_correct(a, b, group_of=subject).named(hostile, hostile)
    for text in (verdict.sentence, shown(verdict, width=400)):
        assert "[red]x[/red] [31m  <script>" in text
        assert not set(text) & {"\x1b", "\u202e"}
    assert verdict.sentence.isprintable()
    # Twice in the title, in two column heads, and in the row of the group.
    assert shown(verdict, width=400).count("[red]x[/red]") == 5


def test_an_evaluation_names_its_own_score(tmp_path: Path) -> None:
    scores = np.random.default_rng(1).random(20).tolist()
    results = [Result(name, tmp_path, lines(scores, "score"), {}) for name in ("base", "sft")]
    [verdict] = judge(results, Perplexity(spec=cast(Any, None)), seed=0)
    assert verdict.as_dict()["called"] == "nats per token"
    assert "mean nats per token of sft is the same as that of base" in verdict.sentence
