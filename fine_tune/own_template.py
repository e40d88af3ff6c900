"""The chat template that a folder of our making was written with, as words of ``model``."""

from __future__ import annotations

from pathlib import Path

from fine_tune.errors import CheckpointError
from fine_tune.models.export import carried
from fine_tune.passport.document import FILE, hash_text, read_passport
from fine_tune.text.template import END_OF_TURN, load_template

TEMPLATE = "chat_template.jinja"


def own_template(folder: Path) -> dict[str, str]:
    """Return ``chat_template`` and ``end_of_turn`` of a merged folder; nothing for a folder without a passport.

    A shipped template goes by its name, as in the run; another one is the folder's own file.

    Raises:
        CheckpointError: The folder's template is not the one that its passport speaks of.
    """
    if not (folder / FILE).is_file():
        return {}
    told = read_passport(folder).template
    name, end = told["name"], told["end_of_turn"]
    file = folder / TEMPLATE
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read, but {FILE} speaks of it. Merge again.") from error
    if hash_text(text) != told["text_sha256"]:
        raise CheckpointError(f"{file}: was changed since {FILE} was written. Merge again, or pass model.chat_template=.")
    shipped = name in END_OF_TURN and carried(load_template(name, bos_token=None, eos_token=end, end_of_turn=end)) == text
    return {"chat_template": name if shipped else str(file), "end_of_turn": end}
