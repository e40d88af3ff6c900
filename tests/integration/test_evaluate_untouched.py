"""What evaluate leaves as it was: one base in memory, random states, modes, adapters; and the terminal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fine_tune import assembly, evaluating, subjects
from fine_tune.cli import evaluate as evaluate_cli
from fine_tune.device import plan_device
from fine_tune.evaluation import answers
from fine_tune.evaluation_config import check_evaluation
from fine_tune.evaluation_parts import build_evaluation
from fine_tune.report.visible import visible
from fine_tune.rng import rng_state

from .asked import CPU, asking, evaluate, items, write_lines
from .conftest import assert_same

HOSTILE = "w1 \x1b[31mred\x1b[0m \u202edrow [bold]w2[/bold] [/] </script><script>alert(1)</script> \x07\x9b2J"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("untouched")


def test_the_base_is_loaded_once_for_three_checkpoints(
    nf4: Path, root: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    load = assembly.load_base
    for module in (assembly, subjects):
        monkeypatch.setattr(module, "load_base", lambda spec: loads.append(spec.folder) or load(spec))
    evaluate(["base", nf4, nf4 / "checkpoints" / "step-0000003"], root / "once", *asking(questions))
    assert len(loads) == 1


def test_the_global_rng_is_left_alone(nf4: Path, root: Path, questions: Path) -> None:
    before = rng_state()
    evaluate(["base", nf4], root / "drawn", *asking(questions, "eval.temperature=0.8"))
    assert_same(before, rng_state(), "rng")


def test_modes_and_the_adapter_are_left_alone(nf4: Path, root: Path, questions: Path) -> None:
    cfg = check_evaluation([f"ckpt=[base,{nf4}]", *CPU, *asking(questions, "eval.temperature=0.8")])
    named = subjects.find(cfg["ckpt"], cfg)
    stage = subjects.Stage(named[1], plan_device(accelerator="cpu", devices=1, num_nodes=1, precision="32-true"))
    evaluation = build_evaluation(cfg["eval"], named, seed=0)
    for one in (named[1], named[0]):
        subject = stage.show(one)
        subject.network.train()
        odd = list(subject.network.modules())[::3]
        for module in odd:
            module.training = False
        before = photograph(subject.network)
        rows = evaluation.prepare(subject.tokenizer, subject.template)
        evaluating._evaluate(one, subject, evaluation, rows, identity={}, folder=root / "modes" / one.label)
        assert_same(before, photograph(subject.network), one.label)


def photograph(network: Any) -> dict[str, Any]:
    """Everything an evaluation might move."""
    return {
        "modes": [module.training for module in network.modules()],
        "state": {name: tensor.clone() for name, tensor in network.state_dict().items() if torch.is_tensor(tensor)},
        "grads": {name: (p.requires_grad, p.grad is None) for name, p in network.named_parameters()},
        "off": [getattr(module, "disable_adapters", None) for module in network.modules()],
        "active": list(network.active_adapters),
        "caches": [getattr(module, "gradient_checkpointing", None) for module in network.modules()],
        "attention": network.get_base_model().config._attn_implementation,
    }


def test_hostile_text_is_inert_on_the_terminal_and_data_in_the_file(
    nf4: Path, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"id": f"{HOSTILE} {i}", "prompt": f"{HOSTILE} {i}", "answer": HOSTILE} for i in range(3)]
    file = write_lines(root / "hostile.jsonl", rows)
    ask = answers.Answerer.continue_prompts

    def hostile(self: Any, prompts: Any, **more: Any) -> Any:
        return [answers.Completion(HOSTILE, one.num_tokens, one.stopped) for one in ask(self, prompts, **more)]

    monkeypatch.setattr(answers.Answerer, "continue_prompts", hostile)
    printed = ""
    for words in (["eval=compare", f"eval.path={file}"], asking(file)):
        found = evaluate(["base", nf4], root / "hostile", *words)
        captured = capsys.readouterr()
        printed += captured.out + captured.err
        for label in ("base", "nf4"):
            lines = items(found, label)
            assert [line["id"] for line in lines] == [row["id"] for row in rows]
            assert {line["completion"] for line in lines} == {HOSTILE}
            assert (Path(found["folder"]) / label / "items.jsonl").read_bytes().isascii()
    assert not hidden(printed), hidden(printed)
    assert "[bold]" in "".join(printed.split()).replace("│", ""), "markup is shown, not obeyed"


def test_hostile_ids_are_inert_in_messages(nf4: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = write_lines(root / "bare.jsonl", [{"id": HOSTILE, "prompt": "w1"}])
    twice = write_lines(root / "twice.jsonl", [{"id": HOSTILE, "prompt": "w1", "answer": "w2"}] * 2)
    for file, told in ((bare, "have neither answer, answers nor facts"), (twice, "appears twice")):
        capsys.readouterr()
        assert evaluate_cli.main([f"ckpt={nf4}", f"run_dir={root / 'told'}", *CPU, *asking(file)]) == 3
        printed = capsys.readouterr()
        assert told in printed.err
        assert not hidden(printed.out + printed.err), hidden(printed.out + printed.err)


def test_hostile_folders_are_inert_and_paths_are_whole(
    nf4: Path, stand_in: tuple[Path, Path], root: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model's folder stands in "loading ...", the results' folder in the last line; neither is markup."""
    name = HOSTILE.replace("/", "").replace("\x9b", "")
    # As markup, a closing tag that nothing opened: rich would stop with an error.
    run, model, place = root / f"{name} run", root / f"{name} [" / "nope] model", root / ("long " * 30 + name)
    shutil.copytree(nf4, run)
    shutil.copytree(stand_in[0], model)
    config = run / "config.yaml"
    config.write_text(
        config.read_text(encoding="utf-8").replace(str(stand_in[0]), json.dumps(str(model))), encoding="utf-8"
    )
    capsys.readouterr()
    for _ in range(2):
        words = [f"ckpt=['{run}','{model}']", f"run_dir='{place}'", *CPU, *asking(questions)]
        assert evaluate_cli.main(words) == 0
        printed = capsys.readouterr().out
        assert not hidden(printed), hidden(printed)
        assert f"everything is in {visible(str(place / 'eval' / 'exact_match'))}\n" in printed
    assert f"items are there already ({visible(str(place))}" in printed


def hidden(text: str) -> set[str]:
    """Characters that steer a terminal or turn the writing direction."""
    return {c for c in text if c in "\x1b\x07\x9b\u202e"}
