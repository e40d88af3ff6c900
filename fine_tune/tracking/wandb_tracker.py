"""Weights & Biases, spoken to by a process of its own, so that nothing it does can hold or end a run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fine_tune.redaction import is_secret, masked
from fine_tune.tracking.context import Ending, RunContext
from fine_tune.tracking.safe_files import safe_files

# What of the environment W&B's process is given: how to find programs and the network, and W&B's own settings.
PASSED = re.compile(
    r"PATH|HOME|USER|LANG|LC_\w+|TZ|TMPDIR|TEMP|TMP|XDG_\w+|PYTHON(PATH|HOME)|(LD|DYLD)_LIBRARY_PATH|SYSTEMROOT|NETRC"
    r"|(HTTPS?|ALL|NO)_PROXY|SSL_CERT_\w+|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE"
    r"|WANDB_(API_KEY|IDENTITY_TOKEN_FILE|BASE_URL|ENTITY|INSECURE_DISABLE_SSL|CONFIG_DIR|RUN_GROUP|NOTES)",
    re.IGNORECASE,
)
# Modes of WANDB_MODE under which nothing is sent.
OFFLINE_MODES = ("offline", "dryrun")


class WandbTracker:
    """Keep a run in W&B: config, metrics, previews as tables, and the adapter as an artifact.

    Args:
        project: Project on the server.
        entity: Team or user; None is your default.
        offline: Keep everything in the run folder, to be sent by ``wandb sync``.
        tags: Labels of the run.
        group: Runs that belong together, such as a sweep's.
        job_type: What kind of run of its group this is.
        log_adapter: Send the exported adapter as an artifact.
        init_seconds: How long the server may take to answer at the start; the run is then kept as if offline.
        finish_seconds: How long the end of the run waits for what is still to be sent.
    """

    rewrites = forgets = False

    def __init__(
        self,
        project: str,
        *,
        entity: str | None = None,
        offline: bool = False,
        tags: Sequence[str] = (),
        group: str | None = None,
        job_type: str | None = "train",
        log_adapter: bool = True,
        init_seconds: float = 30.0,
        finish_seconds: float = 10.0,
    ) -> None:
        mode = os.environ.get("WANDB_MODE", "online")
        self.disabled = mode == "disabled"
        self.offline = offline or mode in OFFLINE_MODES
        self.log_adapter, self.init_seconds, self.finish_seconds = log_adapter, init_seconds, finish_seconds
        self._about = {"project": project, "entity": entity, "tags": list(tags), "group": group, "job_type": job_type}
        self._process: subprocess.Popen[str] | None = None
        self._scratch: str | None = None
        self._gone = False

    def start(self, context: RunContext) -> str | None:
        """Have a process open the run or go on with it; one that finds no server is replaced by one that needs none."""
        if self.disabled:
            return None
        self._run = context
        self._full = context.config.get("method", {}).get("trains") == "all"
        try:
            self._open(context)
        except ConnectionError as error:
            if self.offline or self._gone:
                raise
            self._end_process()
            self.offline = True
            kept = Path(self._open(context)["folder"]).relative_to(context.folder.resolve())
            return f"no connection ({error}); kept in {kept} of the run folder, to be sent with wandb sync."
        return None

    def _open(self, context: RunContext) -> dict[str, Any]:
        self._process = self._spawn(context.folder)
        return self._ask(
            "start",
            **self._about,
            id=context.tracker_id,
            name=context.folder.name,
            folder=str(context.folder.resolve()),
            offline=self.offline,
            init_seconds=self.init_seconds,
            config=dict(context.config),
        )

    def _spawn(self, folder: Path) -> subprocess.Popen[str]:
        self._scratch = self._scratch or tempfile.mkdtemp(prefix="fine_tune_wandb_")
        process = subprocess.Popen(
            # -P: what lies beside that file, or where the run was started, is not the package wandb.
            [sys.executable, "-P", str(Path(__file__).with_name("wandb_process.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env=process_environment(os.environ, folder.resolve(), scratch=self._scratch, offline=self.offline),
            # Ctrl-C is for the run, which then tells this process how it ended.
            start_new_session=True,
        )
        if self._gone:
            process.kill()
        return process

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send a step's numbers."""
        self._ask("log", step=step, numbers=dict(numbers))

    def rows(self, name: str, step: int, rows: list[dict[str, Any]]) -> None:
        """Send rows of text as a table."""
        self._ask("rows", step=step, name=name, columns=list(rows[0]), data=[list(row.values()) for row in rows])

    def finish(self, ending: Ending) -> None:
        """Send the adapter and whatever is left, and close the run."""
        # All weights of a model are too much to send unasked.
        send = self.log_adapter and not self._full if not self.disabled else False
        files = safe_files(ending.adapter) if send and ending.adapter is not None else []
        self._ask("finish", **{**asdict(ending), "adapter": [str(file.resolve()) for file in files]})

    def _ask(self, what: str, **values: Any) -> dict[str, Any]:
        """Send one message and return the answer to it."""
        if self.disabled:
            return {}
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"do": what, **values}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except (OSError, ValueError):
            line = ""  # its pipes are broken, or closed because it was let go
        if not line:
            raise ConnectionError("its process has ended")
        said: dict[str, Any] = json.loads(line)
        if "error" in said:
            raise ConnectionError(masked(said["error"]))
        return said

    def let_go(self) -> None:
        """End the process, and with it W&B's own, which watches it."""
        self._gone = True
        self._end_process()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        if self._process is not None:
            _remove_links(self._run.folder / "wandb")

    def _end_process(self) -> None:
        if self._process is not None:
            with suppress(OSError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait(timeout=5)
            for pipe in (self._process.stdin, self._process.stdout):
                with suppress(OSError):
                    assert pipe is not None
                    pipe.close()


def process_environment(
    environment: Mapping[str, str], folder: Path, *, scratch: str, offline: bool
) -> dict[str, str]:
    """Return the environment of W&B's process: no secret but W&B's own key, and that only where a server is spoken to."""
    passed = {name: value for name, value in environment.items() if PASSED.fullmatch(name)}
    for name in [name for name in passed if name.upper().startswith("WANDB_") and name != "WANDB_API_KEY"]:
        if is_secret(passed[name], key=name):
            del passed[name]
    if offline:
        passed.pop("WANDB_API_KEY", None)
    return {
        **passed,
        # Crash reports to W&B's makers.
        "WANDB_ERROR_REPORTING": "false",
        # Files of artifacts wait beside the run, where wandb sync finds them; the cache is nobody's.
        "WANDB_DATA_DIR": str(folder / "wandb"),
        "WANDB_CACHE_DIR": scratch,
    }


def _remove_links(folder: Path) -> None:
    """Remove links that W&B makes to its own logs elsewhere: a run folder is complete in itself."""
    for place in folder.rglob("*") if folder.is_dir() else ():
        if place.is_symlink():
            with suppress(OSError):
                place.unlink()
