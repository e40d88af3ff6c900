"""What may be off in the rows of a run, each as one check with its outcome."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2

from fine_tune.audit.account import Account
from fine_tune.text.conversation import Message, RowRefused
from fine_tune.text.template import ChatTemplate

Outcome = Literal["passed", "look", "failed"]
# Above this share of unknown tokens the texts are not in a language that the vocabulary knows.
MAX_UNKNOWN_SHARE = 0.01
TALK = (Message("user", "one"), Message("assistant", "two"), Message("user", "three"))


@dataclass(frozen=True)
class Check:
    """One check; ``look`` is for people to judge, ``failed`` ends in a non-zero exit code."""

    name: str
    outcome: Outcome
    says: str


def account_checks(account: Account, tokenizer: Any, *, stop: str) -> Iterator[Check]:
    """Judge the figures over all rows."""
    yield _learned(account)
    yield _stops(account, stop)
    yield _bos(account, tokenizer)
    yield _unknown(account)


def _learned(account: Account) -> Check:
    if account.masked:
        return Check("something to learn", "failed", f"nothing is learned in {', '.join(account.masked)}, ...")
    if not account.num_learned:
        return Check("something to learn", "failed", "no token of any row is learned.")
    return Check(
        "something to learn", "passed", f"{account.learned_share:.1%} of the tokens are learned, some in every row."
    )


def _stops(account: Account, stop: str) -> Check:
    name, count = "end of turn", f"{account.num_stops:,} of {account.num_turns:,} learned turns end in {stop!r}"
    if not account.num_stops:
        return Check(name, "failed", f"{count}: a model trained on them does not stop. Set model.end_of_turn.")
    if account.stop_rate < 1:
        return Check(name, "look", f"{count} ({account.stop_rate:.1%}); the others were cut. Raise data.max_seq_len.")
    return Check(name, "passed", f"{count}.")


def _bos(account: Account, tokenizer: Any) -> Check:
    name, bos = "begin of text", tokenizer.bos_token
    if account.doubled_bos:
        return Check(
            name,
            "failed",
            f"{bos} stands twice in a row in {', '.join(account.doubled_bos)}, ... Take it out of the template.",
        )
    if bos is None:
        return Check(name, "passed", "the tokenizer has no such token.")
    if account.num_without_bos and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        rows = f"{account.num_without_bos:,} of {account.num_rows:,} rows"
        return Check(name, "look", f"{rows} do not begin with {bos}, which this tokenizer puts before every text.")
    with_bos = account.num_rows - account.num_without_bos
    return Check(name, "passed", f"{with_bos:,} of {account.num_rows:,} rows begin with {bos}, none with two.")


def _unknown(account: Account) -> Check:
    count = f"{account.num_unknown:,} of {account.num_tokens:,} tokens ({account.unknown_share:.2%}) are unknown to the vocabulary"
    if account.unknown_share > MAX_UNKNOWN_SHARE:
        return Check(
            "known tokens", "failed", f"{count}; at most {MAX_UNKNOWN_SHARE:.0%} may be. Choose another model."
        )
    return Check("known tokens", "look" if account.num_unknown else "passed", f"{count}.")


def prompts_check(differences: Sequence[tuple[str, Sequence[str]]], num_prompts: int, places: Sequence[str]) -> Check:
    """Judge the prompts of the rows that were compared: their ids and what was found of each."""
    wrong = [(name, found) for name, found in differences if found]
    everywhere = ", ".join(["training", *places])
    if wrong:
        told = "; ".join(f"{name}: {found[0]}" for name, found in wrong[:3])
        return Check("one prompt", "failed", f"{everywhere} differ in {len(wrong)} of {len(differences)} rows: {told}")
    if not num_prompts:
        return Check("one prompt", "look", "no row has a prompt that could be compared.")
    return Check(
        "one prompt",
        "passed",
        f"{num_prompts:,} prompts of {len(differences):,} rows have the same ids in {everywhere}.",
    )


def table_check(different: Sequence[str], compared: int, num_missing: int) -> Check:
    """Judge whether the table holds what the encoder makes of the sources."""
    cure = "Delete the cache (data.cache_dir)."
    if num_missing:
        return Check("tables", "failed", f"{num_missing} rows of the tables are in no source. {cure}")
    if different:
        return Check("tables", "failed", f"{', '.join(different[:5])}: not what the encoder makes of it. {cure}")
    return Check("tables", "passed", f"{compared:,} rows encoded anew are the rows of the tables, token by token.")


def sides_check(different: Sequence[str], compared: int) -> Check:
    """Judge whether both sides of pairs follow the one prompt as the conversations that they are."""
    name, same = "shared prompt", "the conversation that SFT would train on."
    if different:
        return Check(name, "failed", f"{', '.join(different[:5])}: a side behind its prompt is not {same}")
    return Check(name, "passed", f"both sides of {compared:,} pairs are behind their prompt {same}")


def length_check(max_seq_len: int, positions: int | None) -> Check:
    """Judge the longest row that is allowed against the positions that the model was made for."""
    if positions is None:
        return Check("context", "look", "no config.json says for how many tokens the model was made.")
    if max_seq_len > positions:
        return Check(
            "context", "failed", f"data.max_seq_len={max_seq_len}: the model was made for {positions} tokens. Lower it."
        )
    return Check("context", "passed", f"data.max_seq_len={max_seq_len} is within the model's {positions} tokens.")


def room_check(num_long: int, room: int) -> Check:
    """Judge the prompts of held-out questions against the room that is left for them."""
    name = "room to answer"
    if not num_long:
        return Check(name, "passed", f"every held-out prompt fits beside data.max_new_tokens (up to {room:,} tokens).")
    return Check(name, "look", f"{num_long} held-out prompts are over {room:,} tokens and lose their beginning.")


def own_template_check(template: ChatTemplate, tokenizer: Any) -> Check:
    """Compare the template with the tokenizer's own, on one exchange and a question."""
    name = "the tokenizer's template"
    if not tokenizer.chat_template:
        return Check(name, "passed", "the tokenizer brings none.")
    messages = [{"role": message.role, "content": message.content} for message in TALK]
    try:
        own = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        ours = template.render(TALK, add_generation_prompt=True)
    except (RowRefused, jinja2.TemplateError, ValueError, TypeError, LookupError) as refused:
        return Check(name, "look", f"it cannot be compared: {refused}")
    if own == ours:
        return Check(name, "passed", f"{template.name} writes what the tokenizer's own does.")
    return Check(
        name,
        "look",
        f"{template.name} writes {ours!r}, the tokenizer's own {own!r}. Servers take the latter from the hub's files.",
    )
