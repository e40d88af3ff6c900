"""Run as a script in a process of its own: load a model folder with plain transformers and say what it says.

Usage: ``python reload.py <question.json> <answer folder>``. Nothing of this package is imported: what works here works for anyone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(question: dict[str, Any], place: Path) -> None:
    """Load, continue the prompts greedily, and write logits and continuations.

    Args:
        question: ``folder``, ``device``, ``dtype``, ``trust_remote_code``, ``prompts``, ``sequences`` (token ids), ``stop_ids``,
            ``pad_id``, ``max_new_tokens``.
        place: Where ``answer.json`` and ``logits.safetensors`` go.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, GenerationConfig

    # "auto" spreads a model that fits no single device over all of them and the disk.
    where = "auto" if question["device"] == "auto" else {"": question["device"]}
    loader: Any = AutoModelForCausalLM
    model, loading = loader.from_pretrained(
        question["folder"],
        dtype=getattr(torch, question["dtype"]),
        device_map=where,
        offload_folder=str(place / "offload"),
        local_files_only=True,
        trust_remote_code=question["trust_remote_code"],
        output_loading_info=True,
    )
    model.eval()
    decoding = GenerationConfig(
        do_sample=False,
        max_new_tokens=question["max_new_tokens"],
        eos_token_id=question["stop_ids"],
        pad_token_id=question["pad_id"],
    )
    logits: dict[str, Any] = {}
    continuations: list[list[int]] = []
    with torch.inference_mode():
        for number, (prompt, sequence) in enumerate(zip(question["prompts"], question["sequences"], strict=True)):
            start = torch.tensor([prompt], device=model.device)
            found = model.generate(start, attention_mask=torch.ones_like(start), generation_config=decoding)
            own = found[0].tolist()
            continuations.append(own[len(prompt) :])
            for name, ids in (("given", sequence), ("own", own)):
                out = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
                logits[f"{name}.{number}"] = out.logits[0].float().cpu().contiguous()
    save_file(logits, str(place / "logits.safetensors"))
    answer = {
        "continuations": continuations,
        # Names that the files lack, and names that the model does not have.
        "problems": sorted(
            {*loading["missing_keys"], *loading["unexpected_keys"], *map(str, loading["mismatched_keys"])}
        ),
        "peak_rss_bytes": _peak(),
    }
    (place / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def _peak() -> int | None:
    """Read this process's own peak; the one that getrusage reports includes its parent's."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
