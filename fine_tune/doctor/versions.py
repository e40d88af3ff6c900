"""Installed versions against what the project asks for and against versions that are known to be bad."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fine_tune.doctor.finding import Finding, State

OURS = "fine-tune"
SHOWN = (
    "torch", "lightning", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "huggingface_hub", "tokenizers",
    "hydra-core", "omegaconf", "wandb", "safetensors", "numpy",
)  # fmt: skip


class Bad(NamedTuple):
    """Versions to stay away from, why, and who says so."""

    package: str
    versions: str
    state: State
    reason: str
    source: str


KNOWN_BAD = (
    Bad("lightning", "==2.6.2", "broken", "malicious upload: steals credentials when imported", "GHSA-w37p-236h-pfx3"),
    Bad("lightning", "==2.6.3", "broken", "malicious upload: steals credentials when imported", "GHSA-w37p-236h-pfx3"),
    Bad("lightning", "<2.6.6,!=2.6.2,!=2.6.3", "look", "a foreign checkpoint can run code", "lightning 2.6.6, CHANGELOG"),
    Bad("torch", ">=2.14", "look", "beyond what Lightning 2.6 is tested with", "Lightning-AI/pytorch-lightning#21891"),
    Bad("torch", "<2.11", "look", "its packed attention has no sliding window", "torch.nn.attention.varlen"),
    Bad("peft", "<0.20", "broken", "transformers 5 refuses it", "transformers, integrations/peft.py"),
    Bad("bitsandbytes", "<0.46.1", "broken", "transformers 5 refuses it", "transformers, utils/import_utils.py"),
    Bad("jinja2", "<3.1.6", "broken", "its sandbox has holes; transformers 5 refuses it", "transformers, chat_template_utils.py"),
    Bad("transformers", "==5.23.0", "look", "renames that peft does not know: warnings", "transformers, modeling_utils.py"),
    Bad("hydra-core", "<1.3.4", "look", "builds whatever class a config names", "hydra, _internal/target_policy.py"),
    Bad("omegaconf", ">=2.4", "look", "hydra-core 1.3 needs an older one", "hydra-core 1.3.8, METADATA"),
    Bad("wandb", ">=0.32", "look", "Lightning imports a name that it drops", "Lightning-AI/pytorch-lightning#21919"),
    Bad("python", ">=3.14", "broken", "hydra-core 1.3 crashes on it", "hydra-ecosystem/hydra#3147"),
)  # fmt: skip


def installed() -> dict[str, str]:
    """Version of every installed package, under its normal name, and of Python."""
    found = {_normal(d.metadata["Name"]): d.version for d in metadata.distributions() if d.metadata["Name"]}
    return {**found, "python": platform.python_version()}


def version_findings(versions: Mapping[str, str]) -> Iterator[Finding]:
    """Judge installed versions; nothing is imported, since importing a malicious version is what does the harm."""
    shown = {name: versions[_normal(name)] for name in SHOWN if _normal(name) in versions}
    system = f"{versions['python']}, {platform.system()} {platform.machine()}, fine-tune {versions.get(OURS, 'not installed')}"
    yield Finding("python", "ok", system, {"python": versions["python"], "platform": platform.platform()})
    yield Finding("packages", "ok", ", ".join(f"{name} {version}" for name, version in shown.items()), shown)
    yield from _requirement_findings(versions)
    yield from known_bad(versions)


def known_bad(versions: Mapping[str, str]) -> Iterator[Finding]:
    """Name the installed versions that are known to be bad, or say that there are none."""
    found = False
    for bad in KNOWN_BAD:
        version = versions.get(_normal(bad.package))
        if version is not None and SpecifierSet(bad.versions).contains(version, prereleases=True):
            found = True
            says = f"{bad.package} {version}: {bad.reason} ({bad.source})."
            yield Finding("known-bad version", bad.state, says, {"package": bad.package, "version": version})
    if not found:
        yield Finding("known-bad versions", "ok", f"none of the {len(KNOWN_BAD)} that are on the list.")


def _requirement_findings(versions: Mapping[str, str]) -> Iterator[Finding]:
    if OURS not in versions:
        yield Finding(
            "requirements", "look", "fine-tune is not installed, so what it asks for is not known: pip install -e ."
        )
        return
    needed = [Requirement(line) for line in metadata.requires(OURS) or []]
    own = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    missing = [one for one in own if _normal(one.name) not in versions]
    outside = [one for one in own if one not in missing and not _fits(one, versions)]
    for one in missing:
        yield Finding("requirements", "broken", f"{one} is not installed: pip install -c constraints.txt -e .")
    for one in outside:
        has = versions[_normal(one.name)]
        yield Finding(
            "requirements", "look", f"{one.name} {has} is outside {one.specifier}: pip install -c constraints.txt -e ."
        )
    if not (missing or outside):
        yield Finding("requirements", "ok", f"all {len(own)} are installed, within the ranges that are known to work.")
    yield Finding("extras", "ok", ", ".join(_extras(needed, versions)))


def _extras(needed: list[Requirement], versions: Mapping[str, str]) -> Iterator[str]:
    for extra in _extras_named():
        own = [
            r
            for r in needed
            if r.marker and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""})
        ]
        lacking = [one.name for one in own if _normal(one.name) not in versions or not _fits(one, versions)]
        yield f"{extra} lacks {', '.join(lacking)}" if lacking else f"{extra} is installed"


def _extras_named() -> list[str]:
    return metadata.metadata(OURS).get_all("Provides-Extra") or []


def _fits(one: Requirement, versions: Mapping[str, str]) -> bool:
    return one.specifier.contains(versions[_normal(one.name)], prereleases=True)


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
