"""A held snapshot never keeps an accepted request out: drawn, and one case built."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from sglang.srt.managers.schedule_policy import AddReqResult

from sglang_kvc.config.options import KVCompressOptions
from sglang_kvc.errors import ConfigError
from sglang_kvc.requests.request_options import parse_request_options, resolve_budget
from sglang_kvc.scheduling import admission, attached
from sglang_kvc.sessions.snapshot import Snapshot
from sglang_kvc.sessions.store import SessionStore
from sglang_kvc.upstream.generation import UPSTREAM
from tests.unit.lonely_request import PAGE, Case, Server, walk
from tests.unit.test_course import CASES, cases, drawn


@dataclasses.dataclass(frozen=True)
class KeepingCase(Case):
    """A server that keeps sessions."""

    def options(self) -> KVCompressOptions:
        """The server's options."""
        return dataclasses.replace(super().options(), sessions=True)


class KeepingServer(Server):
    """An idle server that holds a snapshot of the beginning of its request's text."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.tree.sessions = SessionStore()

    def hold(self, req: Any, fold: int, packed: int, tail: int = 0) -> Snapshot:
        """Leave a snapshot, as an earlier request with other options would have."""
        store, ids = self.tree.sessions, req.origin_input_ids
        snapshot: Snapshot = store.make(
            digest=attached.text_of(req).prefix(ids, fold),
            fold=fold,
            packed=packed,
            offsets=None,
            unit=None,
            passes=1,
        )
        self.tree.add_branch(snapshot, self.allocator.alloc(packed))
        if tail:
            row = self.allocator.alloc(tail)
            ended = type("Ended", (), {"kv": type("KV", (), {"cache_inserted_len": 0})})
            self.tree.extend_branch(snapshot, ended, ids[fold : fold + tail], row, 0)
        return snapshot


def paged(tokens: int) -> int:
    """Whole pages below."""
    return tokens // PAGE * PAGE


def budget_at(case: Case, length: int) -> int:
    """What the case's request may keep; 16 if its options are wrong."""
    try:
        request = parse_request_options({"kv_compress": case.kv}, case.options())
    except ConfigError:
        return PAGE
    budget = resolve_budget(request, case.options(), length)
    return PAGE if budget is None else max(budget, PAGE)


@st.composite
def held_cases(draw: Any) -> tuple[KeepingCase, int, int, int]:
    """A case, and the fold, packed tokens and tail of a snapshot that fits its pool."""
    case = draw(cases())
    values = {**vars(case), "radix": True, "cached": 0}
    most = paged(case.prompt)
    assume(most >= 2 * PAGE)
    fold = PAGE * draw(st.integers(2, most // PAGE))
    # A pass gives back a page at least, and has had room for its copy.
    widest = min(fold - PAGE, paged(case.pool // 2 - 2 * PAGE))
    assume(widest >= PAGE)
    least = min(budget_at(case, fold), widest)
    packed = PAGE * draw(
        st.integers(least // PAGE, widest // PAGE) | st.just(widest // PAGE)
    )
    room = min(most - fold, paged(case.pool) - packed - PAGE)
    tail = PAGE * draw(st.integers(0, max(room // PAGE, 0)))
    return KeepingCase(**values), fold, packed, tail


@settings(drawn, max_examples=CASES // 4)
@given(held_cases())
def test_what_is_accepted_runs_alone_beside_a_snapshot(
    held: tuple[KeepingCase, int, int, int],
) -> None:
    """From it or not, at the first try, and within the pool to its end."""
    case, fold, packed, tail = held
    server = KeepingServer(case)
    req = server.request()
    if attached.refusal_of(req) is not None:
        return
    snapshot = server.hold(req, fold, packed, tail)
    tries = []
    original = admission._add_from

    def noted(hit: Any, *rest: Any) -> Any:
        tries.append(hit)
        return original(hit, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(admission, "_add_from", noted)
        assert server.admit(req) is AddReqResult.CONTINUE
    (hit,) = tries
    event("resumed" if hit is not None else "computed")
    assert attached.hit_of(req) is hit
    if hit is not None:
        assert hit.snapshot is snapshot
        assert UPSTREAM.prefix_len(req) == hit.tokens
        assert attached.policy_of(req).budget(fold) >= packed
    assert walk(case, req, hit) <= case.pool


def case_of_a_rich_snapshot() -> tuple[KeepingCase, int, int]:
    """A request that would keep an eighth of a text of which nearly all is held."""
    kv = {"rate": 8}
    case = KeepingCase(
        *(2048, 8192, 512, "never", True, True, 32, 64, 48, 4, 1100, 32, 0), kv=kv
    )
    return case, 960, 896


def admitted(taken: int, hold: bool) -> tuple[Any, Any, Any]:
    """Result of admission while nobody runs and `taken` tokens are somebody's."""
    case, fold, packed = case_of_a_rich_snapshot()
    server = KeepingServer(case)
    req = server.request()
    snapshot = server.hold(req, fold, packed) if hold else None
    if taken:
        server.allocator.alloc(taken)
    return server.admit(req), req, snapshot


def test_a_snapshot_is_given_up_if_its_request_does_not_fit_beside_it() -> None:
    """Nobody runs, but one that has ended has not given back its pages yet.

    What starts from a rich snapshot keeps as much, so its copy is larger than that of
    a request which computes its prompt itself.
    """
    results = []
    for taken in range(0, 2048, PAGE):
        if 896 + taken > 2048 - PAGE:
            break
        result, req, snapshot = admitted(taken, hold=True)
        plain, _, _ = admitted(taken, hold=False)
        # A snapshot is no reason to be refused.
        assert (result is AddReqResult.CONTINUE) == (plain is AddReqResult.CONTINUE)
        resumes = attached.hit_of(req) is not None
        results.append((result is AddReqResult.CONTINUE, resumes))
        if not resumes:
            assert UPSTREAM.prefix_len(req) == 0
            assert attached.policy_of(req).least_budget == 0
            assert not snapshot.borrowers
    # First from the snapshot, then without it, then not at all.
    assert list(dict.fromkeys(results)) == [(True, True), (True, False), (False, False)]
