"""A program of SGLang's frontend language, whose calls all share one setting.

python docs/examples/frontend_program.py --url http://127.0.0.1:30000 --rate 8
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import sglang as sgl

from sglang_kvc.frontend import KVCompressEndpoint

STORY = (
    "A keeper lived alone in a lighthouse. One night a ship without a name came by; "
    "its sails were torn and nobody stood at the wheel. The keeper rang his bell three "
    "times, and the ship answered. In the morning a box of iron lay on the rocks."
)


@sgl.function
def read(s: Any, text: str, max_tokens: int) -> None:
    """Sum a text up, then ask two things about it side by side."""
    s += f"{text}\n\nIn short: "
    s += sgl.gen("summary", max_tokens=max_tokens, temperature=0)
    branches = s.fork(2)
    for branch, question in zip(
        branches, ("Who is in it?", "What is found?"), strict=True
    ):
        branch += f"\n\n{question} "
        branch += sgl.gen("answer", max_tokens=max_tokens, temperature=0)
    s["answers"] = [branch["answer"] for branch in branches]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program once."""
    parser = argparse.ArgumentParser(description="A program with two branches.")
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--rate", type=float, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    given = parser.parse_args(arguments)
    endpoint = KVCompressEndpoint(given.url, rate=given.rate)
    state = read.run(text=STORY, max_tokens=given.max_tokens, backend=endpoint)
    if state.error() is not None:
        raise SystemExit(f"the program failed: {state.error()}")
    print(state["summary"], *state["answers"], sep="\n---\n")
    kept = state.get_meta_info("summary")["kv_compress"]
    print(f"[{kept['resident_tokens']} of {kept['logical_tokens']} tokens kept]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
