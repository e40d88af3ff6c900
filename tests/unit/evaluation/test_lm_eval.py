from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

import lm_eval.tasks
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel

from fine_tune.errors import ConfigError
from fine_tune.evaluation import harness
from fine_tune.evaluation.harness import ChatPrompt, Harness
from fine_tune.evaluation.harness_model import NetworkLM
from fine_tune.evaluation.verdict import compare
from fine_tune.models.adapter import ADAPTER, AdapterSpec, adapter_off, attach, causal_lm
from fine_tune.models.attention import PACKED
from fine_tune.text.conversation import Message
from fine_tune.text.encode import Encoder

from ..models.conftest import llama, randomize
from .harness_files import NUM_ROWS, PICK, ROLL, TASKS, WRITE, lines_of, subject, template, tokenizer, write_tasks


def theirs(model: PreTrainedModel, folder: Path, names: list[str], **options: Any) -> dict[str, Any]:
    """What lm-eval itself says through HFLM, over padded batches of plain transformers."""
    training = model.training
    model.set_attn_implementation("sdpa")
    own = tokenizer()
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    # With its cache of logits HFLM 0.4.13 is off by 1e-3 nats where rolling windows of a batch hold the same tokens.
    wrapped = HFLM(pretrained=model, tokenizer=own, batch_size=3, logits_cache=False)
    found = lm_eval.simple_evaluate(wrapped, tasks=names, task_manager=manager, bootstrap_iters=1000, **options)
    model.set_attn_implementation(PACKED)
    model.train(training)
    assert found is not None
    return dict(found)


def same_answers(lines: list[dict[str, Any]], found: dict[str, Any]) -> int:
    """Compare every line with lm-eval's sample of it; returns how many log-probabilities were compared."""
    samples = {f"{name}/{one['doc_id']}": one for name, group in found["samples"].items() for one in group}
    assert list(samples) == [line["id"] for line in lines]
    compared = 0
    for line in lines:
        sample = samples[line["id"]]
        if "completion" in line:
            assert [[line["completion"]]] == sample["resps"]
        else:
            said = [answer[0] for answer in sample["resps"]]
            logps = [answer[0] if isinstance(answer, tuple) else answer for answer in said]
            assert list(line["logps"].values()) == pytest.approx(logps, rel=1e-6, abs=1e-5)
            compared += len(logps)
        if "greedy" in line:
            assert line["greedy"] == sample["resps"][0][0][1]
        for name in sample["metrics"]:
            value = sample[name]
            value = list(value) if isinstance(value, tuple) else value
            assert line["metrics"][f"{name},none"] == pytest.approx(value, rel=1e-6)
    return compared


def same_figures(mine: dict[str, Any], found: dict[str, Any]) -> None:
    for name, figures in found["results"].items():
        owned = mine["groups"].get(name) or mine["tasks"][name]
        for key, value in figures.items():
            # A perplexity's error multiplies that of its log-probabilities.
            close = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert owned[key] == close, (name, key)


def test_numbers_are_those_of_plain_lm_eval_over_plain_transformers(tmp_path: Path) -> None:
    folder, names = write_tasks(tmp_path), list(TASKS)
    asked = subject()
    evaluation = Harness(names, include_path=str(folder))
    lines = lines_of(evaluation, asked)
    found = theirs(asked.network, folder, names)  # type: ignore[arg-type]
    # Three choices, one text and one last word for each row.
    assert same_answers(lines, found) == 5 * NUM_ROWS
    mine = evaluation.metrics(lines)
    same_figures(mine, found)
    assert mine["pick/acc"] == found["results"]["pick"]["acc,none"]
    assert mine["roll/word_perplexity"] == pytest.approx(found["results"]["roll"]["word_perplexity,none"], rel=1e-6)
    assert mine["tasks"]["last_word"]["perplexity_stderr,none"] > 1
    # The last question is longer than the context: of every task that reads it one item is cut.
    assert mine["num_cut"] == 3
    assert [line["id"] for line in lines if line["cut"]] == ["pick/6", "write/6", "last_word/6"]


def test_lines_hold_what_readers_parse(tmp_path: Path) -> None:
    evaluation = Harness(["pick", "write"], include_path=str(write_tasks(tmp_path)))
    lines = lines_of(evaluation, subject())
    pick, write = lines[1], lines[NUM_ROWS + 1]
    assert (pick["prompt"], pick["target"], pick["task"]) == ("a b b c ?", "B", "pick")
    assert pick["choices"] == {"A": " d e", "B": " f", "C": " g h i"}
    assert pick["choice"] == max("ABC", key=lambda letter: pick["logps"][letter])
    assert pick["correct"] is (pick["choice"] == "B")
    assert (write["prompt"], write["target"], write["correct"]) == ("a b b c ?", "d e", False)
    assert write["completion"]
    assert "k" not in write["completion"]
    assert [evaluation.groups(line) for line in (pick, write)] == ["pick", "write"]
    assert evaluation.compares == "correct"
    told = evaluation.note(evaluation.prepare(tokenizer(), template()), tokenizer())
    assert told.endswith(": pick 7, write 7")
    verdict = compare(lines, lines, field="correct", better="higher", group_of=evaluation.groups)
    assert verdict.word == "cannot tell"
    assert verdict.binary


def test_scores_rise_with_what_is_better(tmp_path: Path) -> None:
    brier = {"metric_list": [{"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False}]}
    wrong = {"metric_list": [{**PICK["metric_list"][0], "higher_is_better": False}]}  # type: ignore[index]
    folder = write_tasks(
        tmp_path, roll=ROLL, last_word=TASKS["last_word"], fallen={**PICK, **wrong}, sure={**PICK, **brier}
    )
    evaluation = Harness(["roll", "last_word", "fallen"], include_path=str(folder))
    assert evaluation.compares == "score"
    lines = lines_of(evaluation, subject())
    roll, word, fallen = (lines[i * NUM_ROWS + 1] for i in range(3))
    assert roll["score"] == pytest.approx(roll["logps"]["text"] / 22)
    assert word["score"] == word["logps"]["target"]
    assert fallen["score"] == -float(fallen["choice"] == fallen["target"])
    # A metric of all documents only has no value for one of them.
    assert {line["score"] for line in lines_of(Harness(["sure"], include_path=str(folder)), subject())} == {None}


def test_the_adapter_is_on_or_off_as_asked(tmp_path: Path) -> None:
    folder, names = write_tasks(tmp_path), ["pick", "write", "roll"]
    network = attach(llama(seed=3), AdapterSpec("adapter", rank=4, alpha=32.0))
    randomize(network)
    evaluation = Harness(names, include_path=str(folder))
    adapted, base = (lines_of(evaluation, subject(network, base=off)) for off in (False, True))
    assert base == lines_of(evaluation, subject())
    assert adapted != base
    same_answers(adapted, theirs(causal_lm(network), folder, names))
    with adapter_off(network):
        same_answers(base, theirs(causal_lm(network), folder, names))
    assert network.active_adapters == [ADAPTER]  # type: ignore[union-attr]


def test_modes_random_states_and_attention_come_back(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path)
    network = llama(seed=3)
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    evaluation = Harness(list(TASKS), include_path=str(folder))
    evaluation.metrics(lines_of(evaluation, subject(network)))
    after = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert all(module.training for module in network.modules())
    assert network.config._attn_implementation == PACKED


def test_a_chunk_done_again_by_itself_gives_the_same_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {**WRITE, "generation_kwargs": {"until": ["k"], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}}
    folder = write_tasks(tmp_path, pick=PICK, drawn=drawn)
    monkeypatch.setattr(harness, "CHUNK_DOCUMENTS", 3)
    first = Harness(["pick", "drawn"], include_path=str(folder), seed=5)
    items = first.prepare(tokenizer(), template())
    chunks = first.chunks(items)
    assert chunks == [[0, 1, 2], [3, 4, 5], [6], [7, 8, 9], [10, 11, 12], [13]]
    lines = [first.score(subject(), items, chunk) for chunk in chunks]
    again = Harness(["pick", "drawn"], include_path=str(folder), seed=5)
    others = again.prepare(tokenizer(), template())
    assert [item.digest for item in others] == [item.digest for item in items]
    assert again.score(subject(), others, chunks[4]) == lines[4]
    assert again.score(subject(), others, chunks[1]) == lines[1]
    other_seed = Harness(["drawn"], include_path=str(folder), seed=6)
    assert lines_of(other_seed, subject()) != [line for chunk in lines[3:] for line in chunk]


def test_the_chat_template_is_the_training_path_s(tmp_path: Path) -> None:
    begun = {**WRITE, "gen_prefix": "d e"}
    folder = write_tasks(tmp_path, pick=PICK, write=WRITE, begun=begun)
    own, chat = tokenizer(), template()
    evaluation = Harness(["pick", "write", "begun"], include_path=str(folder), apply_chat_template=True, num_fewshot=1)
    items = {item.id: item for item in evaluation.prepare(own, chat)}
    pick, write, begun_item = (items[f"{name}/2"] for name in ("pick", "write", "begun"))
    *shown, question = pick.prompt.split(" user ")
    assert shown[0] == "<s>"
    # The example is an earlier exchange, and the question the last turn.
    assert shown[1].endswith(" <end>")
    assert " <end> assistant " in shown[1]
    assert question == "a b c c ? <end> assistant "
    assert [request.args[1] for request in pick.requests] == ["d e", "f", "g h i"]
    assert write.requests[0].args[1]["until"] == ["k", "<end>"]
    assert begun_item.prompt.endswith("a b c c ? <end> assistant d e")
    lines = lines_of(evaluation, subject())
    assert all("<end>" not in line["completion"] for line in lines if "completion" in line)
    unlike = Harness(["pick"], include_path=str(folder)).prepare(own, chat)
    assert unlike[2].prompt == "a b c c ?"


@pytest.mark.parametrize("start", ["{{ bos_token }}", ""])
def test_a_chat_prompt_has_the_tokens_of_training(start: str) -> None:
    own, chat = tokenizer(), template()
    # A tokenizer that begins every text by itself.
    own.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", pair=None, special_tokens=[("<s>", 1)])
    chat = replace(chat, source=chat.source.replace("{{ bos_token }}", start))
    question = [Message("user", "a b")]
    prompt = ChatPrompt(chat)([{"role": "user", "content": "a b"}])
    assert prompt == chat.render(question, add_generation_prompt=True)
    asked = replace(subject(), tokenizer=own)
    sizes = {"batch_size": 2, "micro_batch_tokens": 64}
    trained = list(Encoder(own, chat).encode_prompt(question))
    assert NetworkLM(asked, templated=True, **sizes).tok_encode(prompt) == trained
    assert NetworkLM(asked, templated=False, **sizes).tok_encode("a b") == [1, 3, 4]


def test_groups_repeats_and_examples_are_lm_eval_s(tmp_path: Path) -> None:
    voted = {
        **WRITE,
        "repeats": 3,
        "filter_list": [{"name": "vote", "filter": [{"function": "majority_vote"}, {"function": "take_first"}]}],
    }
    folder = write_tasks(tmp_path, pick=PICK, pick_again={**PICK, "doc_to_text": "c {{q}}"}, voted=voted)
    (folder / "all.yaml").write_text(
        "group: all_picks\ntask: [pick, pick_again]\n"
        "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\nmetadata: {version: 1}\n"
    )
    asked = subject()
    evaluation = Harness(["all_picks", "voted"], include_path=str(folder), num_fewshot=2, limit=5)
    lines = lines_of(evaluation, asked)
    found = theirs(asked.network, folder, ["all_picks", "voted"], num_fewshot=2, limit=5)  # type: ignore[arg-type]
    assert len(lines) == 15
    prompts = {
        f"{name}/{one['doc_id']}": one["arguments"][0][0] for name, group in found["samples"].items() for one in group
    }
    assert {line["id"]: line["prompt"] for line in lines} == prompts
    mine = evaluation.metrics(lines)
    same_figures(mine, found)
    assert mine["all_picks/acc"] == found["groups"]["all_picks"]["acc,none"]
    assert list(lines[-1]["metrics"]) == ["exact_match,vote"]


def test_a_digest_names_the_task_s_version_and_settings_not_its_place(tmp_path: Path) -> None:
    def digest(place: str, **changes: Any) -> str:
        folder = write_tasks(tmp_path / place, pick={**PICK, **changes})
        return Harness(["pick"], include_path=str(folder)).prepare(tokenizer(), template())[0].digest

    first = digest("a")
    # Read from elsewhere, the rows' path is a setting of the task.
    assert digest("a", metadata={"author": "x"}) == first
    assert len({first, digest("a", metadata={"version": 2}), digest("a", should_decontaminate=True)}) == 3


def test_a_task_that_wants_more_than_the_context_is_refused(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path, write={**WRITE, "generation_kwargs": {"until": ["k"], "max_gen_toks": 64}})
    evaluation = Harness(["write"], include_path=str(folder))
    with pytest.raises(ConfigError, match="a task generates up to 64 tokens, and the context has 64"):
        lines_of(evaluation, subject())


def test_the_library_s_own_tasks_are_read_only_where_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called = []
    real = lm_eval.tasks.TaskManager

    def manager(**options: Any) -> Any:
        called.append(options)
        return real(**options)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    Harness(["pick"], include_path=str(write_tasks(tmp_path)))
    assert [options["include_defaults"] for options in called] == [False]
