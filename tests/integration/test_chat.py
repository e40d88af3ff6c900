"""chat as a user meets it: it says what an evaluation would, token by token, and what is saved trains."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest

from fine_tune import assembly
from fine_tune.chat.rows_file import RowsFile
from fine_tune.chat.start import run_chat
from fine_tune.chat.terminal import Terminal
from fine_tune.chat_config import check_chat
from fine_tune.errors import CheckpointError, ConfigError
from fine_tune.evaluation.generate import Batch

from .asked import CPU, evaluate, items, write_lines

NEW_TOKENS = 7
ASKED = ["w1 w2 w3", "w9", "w30 w31 w5 w5 w5 w7 w40", "w11 w12"]


class TakingTheFirst(Terminal):
    """Of two answers that differ the first is always better."""

    def key(self, prompt: str, choices: Collection[str]) -> str | None:
        return "1"


def chat(ckpt: object, lines: Sequence[str], *words: str, pairs: RowsFile | None = None) -> str:
    """Hold a conversation without a terminal, and return everything that was shown."""
    named = f"[{','.join(map(str, ckpt))}]" if isinstance(ckpt, list) else ckpt
    cfg = check_chat([f"ckpt={named}", *CPU, f"max_new_tokens={NEW_TOKENS}", *words])
    shown = io.StringIO()
    run_chat(cfg, pairs, TakingTheFirst(io.StringIO("".join(f"{line}\n" for line in lines)), shown))
    return shown.getvalue()


def answers(shown: str, label: str) -> list[str]:
    """What a checkpoint said, without notes."""
    found = re.findall(rf"^(?:\d )?{re.escape(label)}> (.*)$", shown, flags=re.MULTILINE)
    return [re.sub(r" \((cut off.*|stopped|said nothing)\)$", "", line) for line in found]


def evaluated(ckpt: object, rows: list[dict[str, Any]], place: Path, *words: str) -> dict[str, list[str]]:
    """What evaluate's generation gives for the same turns."""
    file = write_lines(place.with_suffix(".jsonl"), rows)
    asked = ["eval=compare", f"eval.path={file}", f"eval.max_new_tokens={NEW_TOKENS}", "eval.num_items=null", *words]
    found = evaluate(ckpt, place, *asked)
    several = len(found["results"]) > 1
    return {
        label: [line["completion"] for line in items(found, label if several else ".")] for label in found["results"]
    }


# Each question in a conversation of its own.
ONE_BY_ONE = [line for text in ASKED for line in (text, "/reset")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chat")


# Few small steps: an adapter that has learned more says nothing here, as most rows end after a few words.
@pytest.fixture(scope="module")
def nf4(trained: Callable[..., Path]) -> Path:
    """A run on the 4-bit base."""
    return trained("talking_nf4", "optim.lr=1e-3")


@pytest.fixture(scope="module")
def other_rank(trained: Callable[..., Path]) -> Path:
    """A run on the 4-bit base whose adapter has another shape."""
    return trained("talking_rank", "optim.lr=3e-3", "method.rank=2")


@pytest.fixture(scope="module")
def lora(trained: Callable[..., Path]) -> Path:
    """A run on the base as it is stored."""
    return trained("talking_lora", "optim.lr=1.5e-3", "method=lora", "method.rank=4")


@pytest.fixture(scope="module")
def full(trained: Callable[..., Path]) -> Path:
    """A run that trained every weight."""
    return trained("talking_full", "optim.lr=2e-4", "method=full")


@pytest.mark.parametrize("name", ["nf4", pytest.param("lora", marks=pytest.mark.drill), "full", "base"])
def test_the_answers_are_those_of_an_evaluation(name: str, root: Path, request: pytest.FixtureRequest) -> None:
    run: Path = request.getfixturevalue("nf4" if name == "base" else name)
    ckpt, label = (["base", run], "base") if name == "base" else (run, run.name)
    shown = chat(ckpt, ONE_BY_ONE)
    expected = evaluated(ckpt, [{"prompt": text} for text in ASKED], root / name)
    assert {one: answers(shown, one) for one in expected} == expected
    assert len(set(expected[label])) == len(ASKED)
    assert f"{label} on CPU, " in shown
    assert ", template guanaco, context 2,048 tokens\n" in shown


def test_later_questions_see_the_whole_conversation(lora: Path, root: Path) -> None:
    said = answers(chat(lora, ["/system w4 w4", *ASKED]), "talking_lora")
    assert all(said)
    rows = []
    for number in range(len(ASKED)):
        turns = [{"role": "system", "content": "w4 w4"}]
        for question, answer in zip(ASKED[:number], said, strict=False):
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": [*turns, {"role": "user", "content": ASKED[number]}]})
    assert evaluated(lora, rows, root / "turns") == {"talking_lora": said}
    assert answers(chat(lora, ASKED, "system=w4 w4"), "talking_lora") == said
    assert answers(chat(lora, ASKED), "talking_lora") != said


def test_two_adapters_take_turns_on_one_base(
    nf4: Path, other_rank: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    load = assembly.load_base
    monkeypatch.setattr(assembly, "load_base", lambda spec: loads.append(spec) or load(spec))
    earlier = nf4 / "checkpoints" / "step-0000003"
    for number, pair in enumerate(([nf4, other_rank], [earlier, nf4], [other_rank, "base"])):
        loads.clear()
        shown = chat(pair, ONE_BY_ONE)
        assert len(loads) == 1
        found = evaluated(pair, [{"prompt": text} for text in ASKED], root / f"pair-{number}")
        assert {label: answers(shown, label) for label in found} == found
        assert len(set(map(tuple, found.values()))) == 2


def test_checkpoints_on_different_bases_stand_side_by_side(nf4: Path, lora: Path, root: Path) -> None:
    shown = chat([nf4, lora], ONE_BY_ONE)
    found = evaluated([nf4, lora], [{"prompt": text} for text in ASKED], root / "bases")
    assert {label: answers(shown, label) for label in found} == found


def test_what_was_computed_before_is_not_computed_again(nf4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[int] = []
    step = Batch.step

    def counting(self: Batch, ids: Any) -> Any:
        prompts.extend([ids.shape[1]] if self.mask.shape[1] > self.cache.get_seq_length() else [])
        return step(self, ids)

    monkeypatch.setattr(Batch, "step", counting)
    shown = chat([nf4, "base"], ["w1 " * 30, "w2 w3", "w4", "w5", "/undo", "w5"])
    ours, base = prompts[0::2], prompts[1::2]
    assert ours[0] == base[0] >= 30
    # The answer's last token, its end of turn, and the next question: not the thirty words again.
    assert max(ours[1:]) < 16, prompts
    assert len(answers(shown, "talking_nf4")) == 5
    assert max(base[1:]) < 40, "the other's answers are new to the base, the first question is not"


def test_sampling_depends_on_the_seed_alone(nf4: Path) -> None:
    words = ["temperature=1.5", "top_p=0.9"]
    first = chat(nf4, ["w1 w2", "/undo", "w1 w2"], *words)
    assert chat(nf4, ["w1 w2", "/undo", "w1 w2"], *words) == first
    assert answers(chat(nf4, ["w1 w2"], *words, "seed=1"), "talking_nf4")[0] != answers(first, "talking_nf4")[0]
    assert len(set(answers(first, "talking_nf4"))) == 2, "asked again, it says something else"


def test_an_answer_ends_where_the_context_does(root: Path, nf4: Path) -> None:
    model = shutil.copytree(_base_of(nf4), root / "small_model")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 24}), encoding="utf-8")
    shown = chat(model, ["w1 w2 w3", "w4", "w5", "w6 " * 30], "max_new_tokens=100")
    assert "context 24 tokens" in shown
    assert shown.count("the oldest turns are left out") == 1
    assert "(not asked: 34 tokens, and small_model takes 12 beside an answer." in shown
    assert len(answers(shown, "small_model")) == 3
    assert "(cut off: the context is full)" in shown


def _base_of(run: Path) -> Path:
    return Path(re.search(r"path: (\S+/model)$", (run / "config.yaml").read_text(encoding="utf-8"), re.MULTILINE)[1])


def test_what_cannot_be_is_told_before_the_first_question(nf4: Path, root: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a run, a checkpoint of one, a PEFT adapter folder nor a model"):
        chat(root / "nothing", [])
    template = root / "strict.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ m.content }}{{ end_of_turn if m.role == 'assistant' }}{% endfor %}",
        encoding="utf-8",
    )
    with pytest.raises(ConfigError, match=r"system = w1: .*no system here\. Leave it out\."):
        chat(_base_of(nf4), [], f"model.chat_template={template}", "system=w1")


def test_an_adapter_that_is_gone_is_told(nf4: Path, other_rank: Path, root: Path) -> None:
    gone = shutil.copytree(nf4, root / "gone")

    class Deleting(io.StringIO):
        def readline(self, *size: Any) -> str:
            shutil.rmtree(gone, ignore_errors=True)
            return super().readline(*size)

    cfg = check_chat([f"ckpt=[{gone},{other_rank}]", *CPU, "max_new_tokens=2"])
    with pytest.raises(CheckpointError, match=r"ckpt=.*/gone/adapter: no such folder\."):
        run_chat(cfg, None, Terminal(Deleting("w1\n"), io.StringIO()))


@pytest.mark.real
def test_a_model_folder_of_somebody_else_answers(real_data: Path, root: Path) -> None:
    model = real_data / "weights" / "stories260K"
    words = ["model.chat_template=plain"]
    question = "Once upon a time, there was a little girl named Lily."
    shown = chat(model, [question, "/reset"], *words)
    found = evaluated(model, [{"prompt": question}], root / "stories", *words)
    assert answers(shown, "stories260K") == found["stories260K"]
    assert len(found["stories260K"][0]) > 5
