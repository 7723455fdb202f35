"""Let a request start from a snapshot of its text instead of computing it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from sglang_kvc.scheduling.attached import (
    attach_await,
    attach_hit,
    attach_policy,
    hit_of,
    policy_of,
)
from sglang_kvc.scheduling.lookup import keeping
from sglang_kvc.scheduling.request_state import RequestState
from sglang_kvc.scheduling.session_tree import row_of
from sglang_kvc.scheduling.step_plan import Resumed
from sglang_kvc.sessions.snapshot import Hit
from sglang_kvc.upstream.generation import UPSTREAM
from sglang_kvc.upstream.types import PrefillAdder, Req


@contextmanager
def starting_from(hit: Hit | None, adder: PrefillAdder, req: Req) -> Iterator[None]:
    """Let SGLang see a hit as the prefix of a request while it may be admitted.

    SGLang locks the node of the prefix of whom it admits: that is the loan. From then
    on the request keeps at least what the snapshot does, as admission counts.
    """
    if hit is None:
        yield
        return
    policy = policy_of(req)
    assert policy is not None
    before = UPSTREAM.prefix(req)
    attach_policy(req, keeping(policy, hit))
    UPSTREAM.set_prefix(req, UPSTREAM.prefix_at(row_of(hit), hit.node))
    attach_hit(req, hit)
    try:
        yield
    finally:
        if not is_admitted(adder, req):
            UPSTREAM.set_prefix(req, before)
            attach_hit(req, None)
            attach_policy(req, policy)


def is_admitted(adder: PrefillAdder, req: Req) -> bool:
    """Whether the request that was looked at last was admitted."""
    return bool(adder.can_run_list) and adder.can_run_list[-1] is req


def resume(tree: Any, req: Req, state: RequestState) -> Resumed | None:
    """Start the state of an admitted request from its hit; None if it has none."""
    hit = hit_of(req)
    if hit is None:
        return None
    attach_hit(req, None)
    state.resume(hit)
    tree.note_packed(state)
    tree.sessions.hits += 1
    return Resumed(state.slot, hit.snapshot, hit.packed_tokens)


def forget_hit(req: Req) -> None:
    """A request waits (again): it may start from something else, or from nothing."""
    policy = policy_of(req)
    if policy is not None and policy.least_budget:
        attach_policy(req, replace(policy, least_budget=0))
    attach_await(req, True)
