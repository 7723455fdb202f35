"""Programs of SGLang's frontend language."""

from __future__ import annotations

from typing import Any

import sglang as sgl

from sglang_kvc.frontend import KVCompressEndpoint as KVCompressEndpoint


@sgl.function
def read(s: Any, text: str) -> None:
    """Ask about a text: a choice, an answer and two branches."""
    s += text + "\n\nThis text is about "
    s += sgl.select("topic", choices=["programming", "cooking"])
    s += sgl.gen("summary", max_tokens=16, temperature=0, ignore_eos=True)
    branches = s.fork(2)
    for branch, what in zip(branches, ("author", "reader"), strict=True):
        branch += f"\n\nIts {what} "
        branch += sgl.gen("more", max_tokens=8, temperature=0, ignore_eos=True)
    s["kv"] = [branch.get_meta_info("more")["kv_compress"] for branch in branches]


@sgl.function
def ask(s: Any) -> None:
    """Ask for a few words."""
    s += "Whales are " + sgl.gen("answer", max_tokens=4)
