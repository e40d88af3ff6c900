"""The same steps in two processes: each takes its share of the rows, and their gradients are summed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from fine_tune import safe_load
from fine_tune.drills.children import failed, kill
from fine_tune.drills.loaded import Loaded, load
from fine_tune.drills.taking import Taken
from fine_tune.models.adapter import trainable
from fine_tune.modules.parallel import sum_gradients, sum_scalars
from fine_tune.modules.reference import fingerprint
from fine_tune.quiet import quiet_libraries
from fine_tune.storage import write_json

RANKS = 2
JOB = "ranks.json"
TIMEOUT = timedelta(minutes=10)


def values_file(step: int) -> str:
    """Name the file of what trains, as it is at a step."""
    return f"values-{step}.safetensors"


def save_values(loaded: Loaded, folder: Path, step: int) -> None:
    """Keep what trains for the processes to start from."""
    values = {name: p.detach().cpu().contiguous() for name, p in trainable(loaded.network).items()}
    save_file(values, str(folder / values_file(step)))


def take_in_two(cfg: Mapping[str, Any], folder: Path, *, steps: int, wide: bool, on_gpu: bool) -> list[Taken]:
    """Take the steps in two processes, on the values that :func:`save_values` has kept.

    Raises:
        ChildFailed: A process failed, or the two ended with other sums.
    """
    trainer = {**cfg["trainer"], "devices": RANKS, "strategy": "ddp"}
    job = {"cfg": {**cfg, "trainer": trainer}, "steps": steps, "wide": wide, "backend": "nccl" if on_gpu else "gloo"}
    write_json(folder / JOB, job)
    rendezvous = folder / f"rendezvous-{uuid.uuid4().hex[:8]}"
    logs = [folder / f"rank-{rank}.log" for rank in range(RANKS)]
    _wait([_start(folder, rendezvous, rank, log) for rank, log in enumerate(logs)], logs)
    ends = [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(RANKS)]
    if ends[0] != ends[1]:
        raise failed(logs[0], 1)
    return [Taken(ends[0]["losses"][step], safe_load.tensors(folder / f"gradients-{step}.safetensors")) for step in range(steps)]


def _wait(children: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path]) -> None:
    """Wait for all; where one fails, the others would wait for it."""
    try:
        while any(child.poll() is None for child in children):
            for child, log in zip(children, logs, strict=True):
                if child.poll():
                    raise failed(log, child.returncode)
            time.sleep(0.05)
    finally:
        for child in children:
            if child.poll() is None:
                kill(child.pid)
            child.wait()
    for child, log in zip(children, logs, strict=True):
        if child.returncode:
            raise failed(log, child.returncode)


def _start(folder: Path, rendezvous: Path, rank: int, log: Path) -> subprocess.Popen[bytes]:
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // RANKS))
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": threads}
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "fine_tune.drills.ranks", str(folder), str(rendezvous.absolute())],
            env={**os.environ, **place}, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def work(folder: Path, rendezvous: str) -> None:
    """Be one of the processes."""
    quiet_libraries()
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    rank = int(os.environ["RANK"])
    loaded = load(job["cfg"], wide=job["wide"])
    dist.init_process_group(job["backend"], init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS, timeout=TIMEOUT)
    try:
        losses, hashes = [], []
        for step in range(job["steps"]):
            taken = _take(loaded, safe_load.tensors(folder / values_file(step)), step)
            losses.append(taken.loss)
            hashes.append(fingerprint(taken.gradients))
            if rank == 0:
                save_file(dict(taken.gradients), str(folder / f"gradients-{step}.safetensors"))
        write_json(folder / f"rank-{rank}.json", {"losses": losses, "hashes": hashes})
    finally:
        dist.destroy_process_group()


def _take(loaded: Loaded, values: Mapping[str, Tensor], step: int) -> Taken:
    trained = trainable(loaded.network)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(values[name])
    loaded.taker.module.step = step
    batch = loaded.step(step)
    taken = loaded.taker.take(batch, batch.micro_batches)
    device = loaded.taker.plan.device
    for name, parameter in trained.items():
        parameter.grad = taken.gradients[name].to(device)
    sum_gradients(trained.values())
    loss = sum_scalars(torch.tensor([taken.loss], dtype=torch.float64, device=device)).item()
    return Taken(loss, {name: p.grad.cpu() for name, p in trained.items() if p.grad is not None})


def main(argv: Sequence[str]) -> int:
    """Run one process of a drill: the folder of the job and the file where they meet."""
    work(Path(argv[0]), argv[1])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
