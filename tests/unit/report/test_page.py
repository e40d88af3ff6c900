"""What the page says about a run: answers side by side, data, settings, verdicts, and the command line's door."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fine_tune.cli.report import main
from fine_tune.config import check_config
from fine_tune.report import tables
from fine_tune.report.answers import in_order, side_by_side
from fine_tune.report.data_account import account
from fine_tune.report.page import write_report
from fine_tune.report.panels import charts_of, further_charts
from fine_tune.report.previews import previews
from fine_tune.report.reading import RunFiles, read_run
from fine_tune.report.record import record
from fine_tune.report.settings import Difference, differing
from fine_tune.report.visible import plain, visible

from .conftest import Page, write_json, write_jsonl


def item(prompt: str, completion: str, *, right: bool) -> dict[str, object]:
    return {"id": prompt, "prompt": prompt, "completion": completion, "target": "t", "correct": right}


@pytest.fixture
def chain(tmp_path: Path) -> tuple[Path, Path]:
    """An SFT run and a DPO run that started from it."""
    sft, dpo = tmp_path / "sft", tmp_path / "dpo"
    for run, objective, start in ((sft, "sft", None), (dpo, "dpo", str(sft))):
        write_json(run / "summary.json", {"objective": objective, "loss_unit": "nats", "final_loss": 0.25, "steps": 2})
        (run / "config.yaml").write_text(yaml.safe_dump({"init_from": start}), encoding="utf-8")
        write_jsonl(run / "metrics.jsonl", [{"step": s, "train/loss": 2.0 - s} for s in range(2)])
        write_json(run / "eval" / "held_out_base" / "metrics.json", {"metrics": {"exact_match": 0.0}})
        write_json(run / "eval" / "held_out" / "metrics.json", {"metrics": {"exact_match": 1.0}})
    write_jsonl(sft / "eval" / "held_out_base" / "items.jsonl", [item("p1", "ramble one", right=False)])
    write_jsonl(sft / "eval" / "held_out" / "items.jsonl", [item("p1", "long one", right=True)])
    write_jsonl(dpo / "eval" / "held_out_base" / "items.jsonl", [item("p2", "ramble two", right=False)])
    write_jsonl(dpo / "eval" / "held_out" / "items.jsonl", [item("p2", "short two", right=True)])
    write_json(dpo / "eval" / "held_out_initial" / "metrics.json", {"metrics": {"exact_match": 1.0}})
    write_jsonl(dpo / "eval" / "held_out_initial" / "items.jsonl", [item("p2", "long two", right=True)])
    return sft, dpo


def test_a_run_comes_after_the_one_it_started_from(chain: tuple[Path, Path]) -> None:
    sft, dpo = (read_run(folder) for folder in chain)
    assert [run.name for run in in_order([dpo, sft])] == ["sft", "dpo"]
    sft.config["init_from"] = str(dpo.path)
    assert len(in_order([dpo, sft])) == 2


def test_what_the_start_said_counts_for_the_run_it_came_from(chain: tuple[Path, Path]) -> None:
    (beside,) = side_by_side([read_run(folder) for folder in chain])
    assert beside.columns == ("Base", "SFT (sft)", "DPO (dpo)")
    ((prompt, target, said),) = beside.rows
    assert (prompt, target, beside.shared) == ("p2", "t", 1)
    assert [(answer.text, answer.right) for answer in said] == [
        ("ramble two", False),
        ("long two", True),
        ("short two", True),
    ]


def test_code_of_a_models_repository_is_told_in_the_head(tmp_path: Path) -> None:
    heads = {}
    for trusted in (False, True):
        model = {"path": "owner/name", "revision": "0" * 40, "trust_remote_code": trusted}
        run = tmp_path / str(trusted)
        write_json(run / "summary.json", {"steps": 2})
        (run / "config.yaml").write_text(yaml.safe_dump({"model": model}), encoding="utf-8")
        heads[trusted] = Page(write_report(run).read_text(encoding="utf-8")).pieces
    told = f"owner/name, commit {'0' * 40} (model.trust_remote_code)"
    assert [told in heads[trusted] for trusted in (False, True)] == [False, True]
    assert "code run from" in heads[True]


def test_what_a_run_proved_about_itself_is_shown(tmp_path: Path) -> None:
    items = [
        {"name": "masks", "passed": True, "says": "16 of 16 answers end"}, {"name": "base", "passed": False, "says": "1 changed"},
        {"name": "memory", "passed": None, "says": "no card"},
    ]  # fmt: skip
    run = RunFiles(tmp_path, checklist={"items": items})
    assert record(run)["proofs"] == [
        ("masks", "passed: 16 of 16 answers end"), ("base", "FAILED: 1 changed"), ("memory", "nothing to check: no card"),
    ]  # fmt: skip
    assert record(RunFiles(tmp_path, checklist={"items": "none"}))["proofs"] == []


def test_runs_without_a_common_prompt_say_so(chain: tuple[Path, Path]) -> None:
    (chain[1] / "config.yaml").write_text("init_from: elsewhere\n", encoding="utf-8")
    page = Page(write_report(chain[1], others=[chain[0]]).read_text(encoding="utf-8"))
    assert "No prompt was answered by all of Base, SFT (sft), DPO (dpo)." in page.text


def test_runs_are_compared_in_one_table_and_their_losses_in_one_figure(chain: tuple[Path, Path]) -> None:
    alone = Page(write_report(chain[1]).read_text(encoding="utf-8"))
    beside = Page(write_report(chain[1], others=[chain[0], chain[1]]).read_text(encoding="utf-8"))
    assert "The runs compared" in beside.text
    assert beside.text.count("0.2500 nats") == 2
    assert beside.text.count("Training loss") == 1
    assert "The runs compared" not in alone.text


def test_previews_keep_the_last_step_and_say_what_is_left_out(tmp_path: Path) -> None:
    run = RunFiles(tmp_path)
    run.previews = [
        {"step": s, "prompt": "p", "completion": f"c{s}", "base_completion": "b"} for s in range(100, -1, -1)
    ]
    run.previews += [{"step": None, "prompt": "p"}, {"prompt": 4}]
    (shown,) = previews([run])
    (said,) = shown.runs
    assert (said.now, shown.base, len(said.steps), shown.left_out) == (("100", "c100"), "b", 34, 67)
    assert [int(step) for step, _ in said.steps] == list(range(1, 101, 3))


def test_preferences_have_their_figures_and_the_rest_is_further(tmp_path: Path) -> None:
    run = RunFiles(tmp_path)
    run.metrics = [
        {
            "step": s,
            "train/loss": 1.0,
            "val/rewards/margins": 2.0,
            "val/kl": 0.5,
            "train/odd": 1,
            "tokens": 9,
            "mfu": None,
        }
        for s in (0, 5)
    ]
    assert [chart.title for chart in charts_of(run)] == ["Loss", "Reward margin", "KL to the reference"]
    charts, left_out = further_charts(run)
    assert ([chart.title for chart in charts], left_out) == (["odd"], 0)


def test_the_ledger_shows_every_reason_and_what_is_over_the_limit() -> None:
    part = {
        "source": "chat",
        "split": "train",
        "read": 9,
        "kept": 6,
        "dropped": {"too_long": 2, "tie": 1},
        "cut": {"truncate_prompt": 4},
    }
    part |= {"tokens": {"kept": 600, "supervised": 50}, "examples": {"too_long": ["a:1", "a:7"]}}
    found = account(
        {
            **part,
            "parts": [part],
            "lost_share": 0.25,
            "max_seq_len": 100,
            "length_percentiles": {"p50": 50, "p100": 200},
        }
    )
    assert found is not None
    assert [cell.text for cell in found.parts.rows[0]] == ["chat", "train", "9", "6", "4", "3", "600", "50"]
    assert found.reasons is not None
    assert [[cell.text for cell in row] for row in found.reasons.rows] == [
        ["dropped: too_long", "chat", "train", "2", "a:1, a:7"],
        ["dropped: tie", "chat", "train", "1", ""],
        ["cut: truncate_prompt", "chat", "train", "4", ""],
    ]
    assert [(bar.label, bar.width, bar.over) for bar in found.lengths] == [
        ("p50", "60.0", False),
        ("p100", "240.0", True),
    ]
    assert (found.lost, found.limit_at) == ("25.0%", "120.0")


def test_only_what_the_options_do_not_say_is_listed() -> None:
    said = ["objective=dpo", "method=lora"]
    assert differing(check_config(said).cfg).differences == ()
    found = differing(check_config([*said, "optim.lr=0.5", "data.max_seq_len=64"]).cfg)
    assert found.differences == (Difference("data.max_seq_len", "128", "64"), Difference("optim.lr", "0.0003", "0.5"))
    assert found.against == "model=tiny method=lora objective=dpo data=world_dpo optim=adamw"


def test_data_of_the_users_own_is_compared_too() -> None:
    cfg = check_config(["data=chat", "data.path=rows.jsonl"]).cfg
    assert differing(cfg).differences == (Difference("data.path", "unset", "rows.jsonl"),)


@pytest.mark.parametrize(
    ("word", "tone"), [("better", "good"), ("worse", "bad"), ("cannot tell", "open"), ("cannot_tell", "open"), ("<b>", "open")]
)  # fmt: skip
def test_a_verdict_has_the_colour_of_its_word(word: str, tone: str) -> None:
    assert tables.verdict("x", {"sentence": "s", "word": word}).tone == tone


def test_a_verdict_shows_its_groups_and_its_flips(chain: tuple[Path, Path]) -> None:
    for label, said in (("base", "no idea"), ("sft", "Paris")):
        write_json(chain[0] / "eval" / "em" / label / "metrics.json", {"metrics": {"f1": 0.5}})
        write_jsonl(
            chain[0] / "eval" / "em" / label / "items.jsonl",
            [item("q1", said, right=True), item("q2", said, right=True)],
        )
    verdict = {
        "sentence": "better: by 1",
        "word": "better",
        "names": ["base", "sft"],
        "gained": ["q2"],
        "lost": [],
        "interval": [0.1, 0.2],
    }
    groups = [{"name": "law", "mean_b": 0.5, "adjusted_p": 0.03125}]
    write_json(chain[0] / "eval" / "em" / "verdict.json", {**verdict, "groups": groups})
    page = Page(write_report(chain[0]).read_text(encoding="utf-8"))
    row = [piece for piece in page.pieces[page.pieces.index("flipped items") :] if piece.strip()][:13]
    assert row == [
        "flipped items",
        "flip",
        "id",
        "prompt",
        "wanted",
        "base said",
        "sft said",
        "gained",
        "q2",
        "q2",
        "t",
        "no idea",
        "Paris",
    ]
    assert {"better: by 1", "0.03125", "adjusted p", "mean of sft", "0.1, 0.2"} <= set(page.pieces)


def test_names_keep_their_underscores_and_keys_lose_theirs() -> None:
    names = ["base_of_all", "tiny-qlora-world_sft-1a2b3c4d"]
    groups = [{"name": "by_hand", "mean_a": 0.5, "mean_b": 0.7, "num_items": 3}]
    shown = tables.verdict("x", {"sentence": "s", "names": names, "mean_a": 0.1, "adjusted_p": 0.2, "groups": groups}).shown
    assert [label for label, _ in shown.facts] == ["mean of base_of_all", "adjusted p"]
    [table] = shown.tables
    assert table.columns == ("name", "mean of base_of_all", "mean of tiny-qlora-world_sft-1a2b3c4d", "num items")
    assert table.rows[0][0].text == "by_hand"


def test_names_in_a_verdict_lead_nowhere(chain: tuple[Path, Path]) -> None:
    write_jsonl(chain[0].parent / "secret" / "items.jsonl", [item("q1", "outside", right=True)])
    verdict = {"sentence": "s", "names": ["../../secret", "../../../secret"], "gained": ["q1"]}
    write_json(chain[0] / "eval" / "held_out" / "verdict.json", verdict)
    assert "outside" not in write_report(chain[0]).read_text(encoding="utf-8")


def test_any_depth_of_json_becomes_a_table() -> None:
    deep: dict[str, object] = {}
    for _ in range(400):
        deep = {"a": [deep, 1]}
    shown = tables.show({"deep": deep, "rows": [{"a": 1}, {"b": 2}], "n": 3})
    assert shown.facts == (("n", "3"),)
    assert shown.tables[-1].columns == ("a", "b")
    assert [[cell.text for cell in row] for row in shown.tables[-1].rows] == [["1", ""], ["", "2"]]
    long = tables.show({"rows": [{"a": i} for i in range(tables.MAX_ROWS + 5)]}).tables[0]
    assert (len(long.rows), long.left_out) == (tables.MAX_ROWS, 5)


def test_hidden_characters_become_escapes_and_others_stay() -> None:
    assert (
        visible("a\x00\x1b[0m\x85\u202e\u200f\ufeff\U000e0041\ud800")
        == r"a\x00\x1b[0m\x85\u202e\u200f\ufeff\U000e0041\ud800"
    )
    kept = "tab\tline\n\u0645\u06cc\u200c\u062e \u0915\u094d\u200d\u0937 \u00e9 \u4e2d \U0001f469\u200d\U0001f52c"
    assert visible(kept) == kept
    assert plain("x" * 5000).endswith("xx ... (1,000 more characters)")


def test_the_verb_writes_where_it_is_told(
    chain: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([str(chain[1]), str(chain[0])]) == 0
    assert capsys.readouterr().out.strip() == str(chain[1].resolve() / "report.html")
    target = tmp_path / "here" / "page.html"
    assert main([str(chain[0]), f"out={target}"]) == 0
    assert target.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "usage: fine-tune report"),
        (["--help"], 0, "usage: fine-tune report"),
        (["nowhere"], 2, "run = nowhere: no such folder."),
        (["ot=x", "--fast"], 2, "--fast: no setting of report."),
        (["out=x.html"], 2, "run: no folder."),
        (["out=."], 2, "out = .: is a folder."),
    ],
)
def test_the_verb_refuses_in_one_sentence(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == code
    said = capsys.readouterr()
    assert message in (said.err if code else said.out)
