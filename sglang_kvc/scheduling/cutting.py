"""Let SGLang add less of a prompt to a step than it would."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sglang.srt.managers import schedule_policy

from sglang_kvc.scheduling.lengths import UNLIMITED
from sglang_kvc.scheduling.server import Server
from sglang_kvc.upstream.generation import UPSTREAM
from sglang_kvc.upstream.types import PrefillAdder, Req


def longest_chunk(adder: PrefillAdder, server: Server) -> float:
    """New tokens of a prompt that this step takes at most."""
    chunk = adder.rem_chunk_tokens
    return UNLIMITED if chunk is None else server.turns.longest(chunk)


def in_turn(
    adder: PrefillAdder, server: Server, req: Req, call: Callable[[], Any]
) -> Callable[[], Any]:
    """`call` with a chunk that answers can wait for.

    A prompt that is compressed between its chunks keeps their length: what survives
    depends on it. Without chunked prefill no prompt can be cut.
    """
    chunk, longest = adder.rem_chunk_tokens, longest_chunk(adder, server)
    if chunk is None or longest == chunk:
        return call
    return partial(in_chunk, adder, req, int(longest), call)


def in_chunk(adder: PrefillAdder, req: Req, chunk: int, call: Callable[[], Any]) -> Any:
    """Run `call` with at most `chunk` tokens left in the adder's chunk."""
    before = adder.rem_chunk_tokens
    capped = adder.rem_chunk_tokens = min(before, chunk)
    result = call()
    if req not in adder.can_run_list:
        adder.rem_chunk_tokens = before
        return result
    if UPSTREAM.extend_end(req) == len(req.full_untruncated_fill_ids):
        adder.rem_chunk_tokens = before - (capped - adder.rem_chunk_tokens)
        if result is schedule_policy.AddReqResult.OTHER:
            return adder.budget_state()
    return result
