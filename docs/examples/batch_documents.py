"""One question about every text of a folder, several at a time; answers as JSON lines.

    python docs/examples/batch_documents.py FOLDER --question "What is this about?"

A document that is refused, for example because the pool can never hold it, is reported
and the others go on. The question stands behind the document: the end of a prompt
decides what is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask about every document; 1 if one was not answered."""
    parser = argparse.ArgumentParser(description="A question about many documents.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pattern", default="*.txt")
    parser.add_argument("--question", default="What is this text about?")
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--rate", type=float, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=8)
    given = parser.parse_args(arguments)
    paths = sorted(given.folder.glob(given.pattern))
    if not paths:
        raise SystemExit(f"{given.folder} has no {given.pattern}")
    client = openai.OpenAI(base_url=f"{given.url}/v1", api_key="none")

    def ask(path: Path) -> dict[str, Any]:
        prompt = f"{path.read_text()}\n\n{given.question}"
        try:
            reply = client.chat.completions.create(
                model="default",
                messages=[{"role": "user", "content": prompt}],
                temperature=0,
                max_tokens=given.max_tokens,
                # Passes SGLang's gateway, too, which drops custom_params.
                metadata={"kv_compress": f"rate={given.rate:g}"},
            )
        except openai.APIStatusError as error:
            return {"file": path.name, "error": error.message}
        (kept,) = reply.metadata["kv_compress"]  # type: ignore[attr-defined]
        return {
            "file": path.name,
            "answer": reply.choices[0].message.content,
            "tokens": kept["logical_tokens"],
            "kept": kept["resident_tokens"],
        }

    failed = 0
    with ThreadPoolExecutor(given.concurrency) as pool:
        for row in pool.map(ask, paths):
            failed += "error" in row
            print(json.dumps(row), flush=True)
    print(f"[{len(paths) - failed} of {len(paths)} answered]", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
