"""From a name to a folder; what goes wrong is one sentence that says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from fine_tune.errors import ConfigError, EnvironmentProblem, UnsafeArtifact
from fine_tune.models.hub import needs_own_code, resolve_model, resolve_text

COMMIT = "0123456789abcdef" * 2 + "01234567"


def model_folder(place: Path, config: dict[str, Any] | None = None, **tokenizer: Any) -> Path:
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    if tokenizer:
        (place / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return place


def test_the_built_in_model_is_packaged() -> None:
    folder = resolve_model("builtin:tiny")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert list(folder.glob("*.safetensors"))


def test_a_folder_on_disk_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "mine")
    assert resolve_model(str(folder)) == folder
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/mine") == folder
    # owner/name that exists here is that folder, not a download.
    (tmp_path / "owner").mkdir()
    model_folder(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/name") == Path("owner/name")


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the folder has no config\.json\. Pass a model folder or a hub id\."):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("path", ["builtin:huge", "/no/where", "./no", "../no/where", "~/no", "gpt2", "a/b/c", ""])
def test_what_is_neither_folder_nor_hub_id_is_refused_without_asking(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ConfigError, match=r"model\.path="):
        resolve_model(path)


def answer(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/owner/name"))


REFUSALS = [
    (errors.GatedRepoError("no", response=answer(403)), ["owner/name is gated", "hf auth login", "HF_TOKEN"]),
    (errors.RepositoryNotFoundError("no", response=answer(404)), ["was not found on the hub", "check model.path"]),
    (errors.RevisionNotFoundError("no", response=answer(404)), ["has no revision v9", "set model.revision"]),
    (errors.LocalEntryNotFoundError("no"), ["owner/name@v9 is not in the local cache", "HF_HUB_OFFLINE"]),
    (errors.OfflineModeIsEnabled("no"), ["the hub cannot be reached", "go online once"]),
    (errors.HfHubHTTPError("no", response=answer(503)), ["the hub cannot be reached", "model.path=<local folder>"]),
    (ConnectionError("no"), ["the hub cannot be reached", "(ConnectionError)"]),
]


@pytest.mark.parametrize(("error", "words"), REFUSALS, ids=[type(e).__name__ for e, _ in REFUSALS])
def test_each_refusal_of_the_hub_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception, words: list[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(EnvironmentProblem) as told:
        resolve_model("owner/name", revision="v9")
    assert told.value.exit_code == 5
    for word in words:
        assert word in str(told.value)
    assert "\n" not in str(told.value)


def test_offline_without_a_cache_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentProblem, match="owner/name@None is not in the local cache"):
        resolve_model("owner/name")


@pytest.mark.parametrize("code", [False, True])
def test_python_files_come_only_with_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: bool) -> None:
    folder, asked = model_folder(tmp_path / "cached"), {}

    def download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("owner/name", revision=COMMIT, trust_remote_code=code) == folder
    assert (asked["repository"], asked["revision"]) == ("owner/name", COMMIT)
    assert ("*.py" in asked["allow_patterns"]) is code
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])


@pytest.mark.parametrize("revision", [None, "main", "v9", COMMIT[:39], COMMIT.upper()])
def test_code_of_the_hub_comes_only_from_a_pinned_commit(
    monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    for resolve in (resolve_model, resolve_text):
        with pytest.raises(ConfigError, match=r"model\.trust_remote_code=true: .* pinned commit"):
            resolve("owner/name", revision=revision, trust_remote_code=True)


def test_an_adapter_in_a_models_folder_is_told(tmp_path: Path) -> None:
    # transformers would put it on the base that it names, without a word.
    folder = model_folder(tmp_path / "m")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/other"}')
    with pytest.raises(ConfigError, match=r"model\.path=.*: an adapter lies in that folder .*init_from="):
        resolve_model(str(folder))


@pytest.mark.parametrize(
    "config",
    [
        {"attn_implementation": "owner/kernel"},
        {"_attn_implementation": "owner/kernel@main:forward"},
        {"text_config": {"attn_implementation": "owner/kernel"}},
        {"experts_implementation": "owner/kernel"},
    ],
)
def test_a_kernel_of_somebody_else_is_code_as_well(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = model_folder(tmp_path / "m", {"model_type": "llama", **config})
    with pytest.raises(UnsafeArtifact, match=r"_implementation=owner/kernel.*model\.trust_remote_code=true") as refused:
        resolve_model(str(folder))
    assert refused.value.exit_code == 10
    assert resolve_model(str(folder), trust_remote_code=True) == folder
    assert resolve_model(str(model_folder(tmp_path / "n", {"model_type": "llama", "attn_implementation": "sdpa"})))


AUTO_MAP = {"AutoConfig": "canary.Config", "AutoModelForCausalLM": "canary.Model"}


@pytest.mark.parametrize("where", ["config", "tokenizer"])
def test_a_folder_that_wants_to_run_its_own_code_is_refused(tmp_path: Path, where: str) -> None:
    config = {"model_type": "mystery", "auto_map": AUTO_MAP} if where == "config" else {"model_type": "llama"}
    tokenizer = {"auto_map": {"AutoTokenizer": ["canary.T", None]}} if where == "tokenizer" else {}
    folder = model_folder(tmp_path / "m", config, **tokenizer)
    (folder / "canary.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()\n")
    with pytest.raises(UnsafeArtifact, match=r"asks to run code .*auto_map.*model\.trust_remote_code=true") as refused:
        resolve_model(str(folder))
    assert refused.value.exit_code == 10
    assert not (tmp_path / "canary").exists()
    assert resolve_model(str(folder), trust_remote_code=True) == folder


def test_a_known_architecture_needs_no_code_of_its_own() -> None:
    assert not needs_own_code({"model_type": "llama", "auto_map": AUTO_MAP})
    assert not needs_own_code({"model_type": "mystery"})
    assert needs_own_code({"model_type": "mystery", "auto_map": AUTO_MAP})


@pytest.mark.parametrize("code", [False, True])
def test_for_its_tokenizer_no_weights_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: bool) -> None:
    folder, asked = model_folder(tmp_path / "cached"), {}

    def download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_text("owner/name", revision=COMMIT, trust_remote_code=code) == folder
    assert (asked["repository"], asked["revision"]) == ("owner/name", COMMIT)
    assert asked["allow_patterns"] == ["*.json", "*.model", "*.txt", "*.jinja", *(["*.py"] if code else [])]


def test_for_its_tokenizer_a_folder_needs_no_config_and_may_have_a_models_code(tmp_path: Path) -> None:
    assert resolve_text(str(tmp_path)) == tmp_path
    assert resolve_text("builtin:tiny") == resolve_model("builtin:tiny")
    modelled = model_folder(tmp_path / "modelled", {"model_type": "mystery", "auto_map": AUTO_MAP})
    assert resolve_text(str(modelled)) == modelled
    own = model_folder(tmp_path / "own", auto_map={"AutoTokenizer": ["canary.T", None]})
    with pytest.raises(UnsafeArtifact, match=r"tokenizer_config\.json of .* asks to run code"):
        resolve_text(str(own))
    with pytest.raises(ConfigError, match="no such folder"):
        resolve_text("/no/where")
