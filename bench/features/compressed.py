"""Whether an answer's summary says that it was compressed."""

from __future__ import annotations

from bench.features.asking import Asker, Reply
from bench.features.verdicts import expect


def expect_compressed(asker: Asker, reply: Reply, rate: float) -> str:
    """Raise unless it was; in words what was kept.

    What is kept has to be nearer to the rate than to everything: passes come every so
    many tokens, and one that finds no free pages comes later. Stock SGLang has to
    say nothing of it.
    """
    kv = reply.kv
    if asker.stock:
        expect(not kv, "no summary of compression from stock SGLang", kv)
        return "not compressed"
    expect(bool(kv), "a summary of compression", "none")
    kept, all_tokens = kv["resident_tokens"], kv["logical_tokens"]
    wanted = f"less than {2 / rate:.2f} of the tokens kept after a pass"
    expect(kv["enabled"] and kv["passes"] > 0, wanted, kv)
    expect(kept < all_tokens * 2 / rate, wanted, kv)
    return f"{kept:.0f} of {all_tokens} tokens kept"
