"""The licence of a base model, from its own files, else from what is known of the models that this project ships configs for."""

from __future__ import annotations

from pathlib import Path

from fine_tune import safe_load

# Hub ids begin with these; the values are the hub's own names of licences.
KNOWN = {
    "builtin:": "apache-2.0",
    "meta-llama/Llama-2-": "llama2",
    "meta-llama/Llama-3.2-": "llama3.2",
    "meta-llama/Llama-3.1-": "llama3.1",
    "mistralai/Mistral-7B-": "apache-2.0",
    "microsoft/phi-2": "mit",
    "Qwen/Qwen2.5-0.5B": "apache-2.0",
    "HuggingFaceTB/SmolLM2-": "apache-2.0",
    "EleutherAI/pythia-": "apache-2.0",
}


def licence_of(path: str, folder: Path | None) -> str | None:
    """Return the hub's name of a base's licence, None where nothing says it.

    Args:
        path: The hub id or folder in the config.
        folder: Where its files are, if they are there.
    """
    found = _front_matter(folder / "README.md").get("license") if folder is not None else None
    if isinstance(found, str) and found:
        return found
    return next((licence for start, licence in KNOWN.items() if path.startswith(start)), None)


def _front_matter(readme: Path) -> dict[str, object]:
    try:
        text = readme.read_text(encoding="utf-8")
        found = safe_load.yaml_text(text.split("---", 2)[1]) if text.startswith("---") else {}
    except (OSError, ValueError, IndexError):
        return {}
    return found if isinstance(found, dict) else {}
