"""Real data sets through real tokenizers: the audit passes, and what it shows is what the files say."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from fine_tune.audit.audit import Audit, audit
from fine_tune.audit.page import render
from fine_tune.config import check_config

pytestmark = pytest.mark.real

TEMPLATES = {"llama": "llama2", "mistral": "mistral_instruct", "phi": "phi2", "pythia": "guanaco"}
DATA = {
    "oasst1": ("data=oasst1", "data.path={}/oasst1", "data.max_lost_share=0.3"),
    "sharegpt": ("data=chat", "data.path={}/instruct/sharegpt_500.json"),
    "alpaca": ("data=instructions", "data.path={}/instruct/alpaca_en_demo.json"),
    "ultrafeedback": ("objective=dpo", "data=ultrafeedback", "data.path={}/preference/ultrafeedback_eval_200.jsonl"),
}
# Every data set and every tokenizer once; all pairs of them are a drill.
DEFAULT = set(zip(DATA, TEMPLATES, strict=True))
PAIRS = [
    pytest.param(*pair, marks=() if pair in DEFAULT else pytest.mark.drill, id="-".join(pair))
    for pair in itertools.product(DATA, TEMPLATES)
]


def look(real_data: Path, cache: Path, data: str, tokenizer: str, *more: str) -> Audit:
    words = [word.format(real_data) for word in DATA[data]]
    model = [f"model.path={real_data}/tokenizers/{tokenizer}", f"model.chat_template={TEMPLATES[tokenizer]}"]
    keys = [
        "data.max_seq_len=512",
        "data.max_lost_share=0.6",
        "data.max_examples=100",
        f"data.cache_dir={cache}",
        *more,
    ]
    return audit(check_config([*model, *words, *keys]).cfg, number=2)


def text_of(row: Any, *states: str) -> str:
    return "".join(t.text for part in row.parts for t in part.tokens if not states or t.state in states)


@pytest.mark.parametrize(("data", "tokenizer"), PAIRS)
def test_real_rows_pass(real_data: Path, tmp_path: Path, data: str, tokenizer: str) -> None:
    found = look(real_data, tmp_path, data, tokenizer)
    assert found.failed == []
    outcomes = {check.name: check.outcome for check in found.checks}
    assert outcomes["end of turn"] == outcomes["one prompt"] == outcomes["tables"] == "passed"
    assert found.account.stop_rate == 1.0
    kept = [row for row in found.rows if not row.kind.startswith("dropped")]
    assert len(kept) >= 6
    assert any(row.differences == () for row in kept)
    assert not any(row.differences for row in kept)
    assert all(text_of(row, "learned").endswith(found.facts[5][1].split("'")[1]) for row in kept)
    assert ("shared prompt" in outcomes) is (data == "ultrafeedback")
    assert len(render(found, command="c")) > 20_000


def test_cut_and_dropped_rows_of_oasst1_are_shown(real_data: Path, tmp_path: Path) -> None:
    found = look(real_data, tmp_path, "oasst1", "llama")
    cut = [row for row in found.rows if row.kind == "cut by keep_last_turns"]
    assert [(row.num_tokens <= 512, row.num_cut > 0, row.differences) for row in cut] == [(True, True, None)] * 2
    # What a thread lost is a whole exchange, from its question on.
    assert all("[INST]" in text_of(row, "cut") for row in cut)
    dropped = [row for row in found.rows if row.kind == "dropped: too_long"]
    assert len(dropped) == 2
    assert all(row.num_tokens == 0 and row.num_cut > 512 for row in dropped)


def test_an_end_of_turn_that_merges_with_the_answer_fails(real_data: Path, tmp_path: Path) -> None:
    template = tmp_path / "dot.jinja"
    template.write_text(
        "{{ bos_token }}{% for m in messages %}{{ 'Q: ' if m.role == 'user' else '\\nA: ' }}{{ m.content | trim }}"
        "{{ end_of_turn if m.role == 'assistant' }}{% endfor %}{{ '\\nA:' if add_generation_prompt }}"
    )
    found = look(real_data, tmp_path, "alpaca", "llama", f"model.chat_template={template}", "model.end_of_turn='!'")
    assert "rows" in {check.name for check in found.failed}
    assert any("does not end in the learned token '!'" in check.says for check in found.failed)
