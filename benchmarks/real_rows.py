"""Make the folder that speed.py takes from real weights and real rows, so that both sides read the same texts and template.

    python benchmarks/real_rows.py story --model stories260K --rows alpaca.json --max-tokens 512

Rows are Alpaca's (a list of instruction, input, output). Those that are longer than the limit under the template are left out, for
both sides alike. Writes model/ (a copy, with the template and a padding token in its tokenizer), rows.jsonl and template.jinja.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from transformers import AutoTokenizer

TEMPLATE = """{{- bos_token -}}
{%- for message in messages -%}
{{- message.content + '\\n\\n' if message.role == 'user' else message.content + eos_token -}}
{%- endfor -%}
"""


def messages_of(row: dict[str, str]) -> list[dict[str, str]]:
    """Write one Alpaca row as a conversation."""
    prompt = "\n\n".join(text.strip() for text in (row["instruction"], row.get("input", "")) if text.strip())
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": row["output"].strip()}]


def main() -> None:
    """Write everything and print how long the rows are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="a folder with weights and tokenizer")
    parser.add_argument("--rows", type=Path, required=True, help="a JSON list of Alpaca rows")
    parser.add_argument("--max-tokens", type=int, default=512)
    args = parser.parse_args()
    shutil.copytree(args.model, args.folder / "model", dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(str(args.model))
    tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    tokenizer.save_pretrained(str(args.folder / "model"))
    (args.folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    talks = [messages_of(row) for row in json.loads(args.rows.read_text(encoding="utf-8")) if row["output"].strip()]
    texts = [str(tokenizer.apply_chat_template(talk, tokenize=False)) for talk in talks]
    sizes = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    kept = [(talk, size) for talk, size in zip(talks, sizes, strict=True) if size <= args.max_tokens]
    text = "".join(json.dumps({"messages": talk}) + "\n" for talk, _ in kept)
    (args.folder / "rows.jsonl").write_text(text, encoding="utf-8")
    print(f"{args.folder}: {len(kept)} of {len(talks)} rows, {sum(size for _, size in kept) / len(kept):.1f} tokens on average")


if __name__ == "__main__":
    main()
