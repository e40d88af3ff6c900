"""Which files of an adapter's folder may leave the machine."""

from __future__ import annotations

from pathlib import Path

# Weights that are only numbers, and text; nothing that is unpickled or executed.
SUFFIXES = (".safetensors", ".json", ".jinja", ".md", ".txt", ".model")


def safe_files(folder: Path) -> list[Path]:
    """Return the plain files directly in a folder that are weights as numbers, or text; links are left out."""
    files = (file for file in folder.iterdir() if file.is_file() and not file.is_symlink())
    return sorted(file for file in files if file.suffix in SUFFIXES and not file.name.startswith("."))
