"""A request gives back its memory, as SGLang asks for it, and starts again as new."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache import common
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_kvc.config.options import KVCompressOptions
from sglang_kvc.memory.cpu_allocator import TorchPagedAllocator
from sglang_kvc.requests.request_options import RequestOptions
from sglang_kvc.scheduling.attached import attach_policy, state_of
from sglang_kvc.scheduling.passes import PassScheduler
from sglang_kvc.scheduling.policy import RequestPolicy
from sglang_kvc.scheduling.request_state import RequestState
from sglang_kvc.scheduling.settling import settle_pass
from sglang_kvc.upstream.generation import UPSTREAM, Generation22
from tests.doubles import root_of, tree_of

POOL = 1024
PROMPT = 200
OPTIONS = KVCompressOptions(budget=64, min_budget=64, interval=16)


class Server:
    """SGLang's request table and allocator, our tree and our plans; no model."""

    def __init__(self, *, radix: bool) -> None:
        kvcache = SimpleNamespace(store_dtype=torch.float32)
        self.slots = ReqToTokenPool(4, 512, "cpu", False)
        self.allocator: Any = TorchPagedAllocator(
            POOL, 16, torch.float32, "cpu", kvcache, False
        )
        params = CacheInitParams(
            disable=not radix,
            req_to_token_pool=self.slots,
            token_to_kv_pool_allocator=self.allocator,
            page_size=16,
        )
        self.tree = tree_of(params)
        self.passes = PassScheduler(OPTIONS, num_slots=5)

    def request(self) -> Any:
        req = Req(
            rid="x",
            origin_input_text="",
            origin_input_ids=array("q", range(PROMPT)),
            sampling_params=SamplingParams(temperature=0, max_new_tokens=8),
        )
        attach_policy(req, RequestPolicy(OPTIONS, RequestOptions()))
        return req

    def prefill(self, req: Any) -> list[int]:
        """A prefill step of the whole prompt; the slots that it resets."""
        req.full_untruncated_fill_ids = req.origin_input_ids
        UPSTREAM.make_extend(req, PROMPT)
        batch: Any = SimpleNamespace(
            reqs=[req],
            tree_cache=self.tree,
            token_to_kv_pool_allocator=self.allocator,
        )
        (slot,) = self.slots.alloc([req])
        pages = self.allocator.alloc(-(-PROMPT // 16) * 16)
        self.slots.write((slot, slice(PROMPT)), pages[:PROMPT].int())
        _own(req, PROMPT)
        self.passes.plan_extend(batch)
        return list(batch.kv_compress_plan.reset_slots)

    def release(self, req: Any, **how: bool) -> None:
        """As SGLang does it when a request ends, or is retracted."""
        common.release_kv_cache(req, self.tree, **how)

    @property
    def everything_is_back(self) -> bool:
        held = self.tree.evictable_size()
        return bool(self.allocator.available_size() + held == POOL)


def _own(req: Any, tokens: int) -> None:
    """Tokens that SGLang has given a request, all of them computed."""
    if isinstance(UPSTREAM, Generation22):
        req.kv.kv_committed_len = req.kv.kv_allocated_len = tokens
        return
    from sglang.srt.managers.schedule_batch import ReqKvInfo

    req.kv = ReqKvInfo(kv_allocated_len=tokens, swa_evicted_seqlen=0)
    req.kv_committed_len = tokens


def retraction() -> dict[str, bool]:
    """How SGLang asks to keep nothing."""
    name = "checkpoint" if isinstance(UPSTREAM, Generation22) else "is_insert"
    return {name: False}


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is over-allocated depends on settings, which nobody has published."""
    owned = "owned_kv_len" if UPSTREAM.frees_rows else "effective_kv_committed_len"
    monkeypatch.setattr(Req, owned, lambda req: UPSTREAM.committed_len(req))
    monkeypatch.setattr(common, "_release_overallocated_kv_indices", lambda *_: None)


def started(server: Server, *, settled: bool) -> tuple[Any, RequestState]:
    """A request whose prompt has had its pass."""
    req = server.request()
    assert server.prefill(req) == [UPSTREAM.slot(req)]
    state = state_of(req)
    assert state is not None
    (launched,) = state.in_flight
    if settled:
        settle_pass(server.tree, launched)
        assert state.settled_fold
    return req, state


@pytest.mark.parametrize("radix", [True, False])
@pytest.mark.parametrize("settled", [True, False])
def test_a_retracted_request_has_no_state_of_its_former_memory(
    settled: bool, radix: bool
) -> None:
    """Not while it waits, and admission asks for its fold; not when it returns."""
    server = Server(radix=radix)
    req, former = started(server, settled=settled)
    assert former.fold
    server.release(req, **retraction())
    assert not UPSTREAM.holds_memory(req)
    assert state_of(req) is None
    assert not former.in_flight
    req.reset_for_retract()
    req.last_node = root_of(server.tree)
    assert state_of(req) is None
    # Its row is new to it, even where it is the old one.
    assert server.prefill(req) == [UPSTREAM.slot(req)]
    state = state_of(req)
    assert state is not None
    assert state is not former
    assert (state.settled_fold, state.settled_packed) == (0, None)
    assert [it.decision.is_first for it in state.in_flight] == [True]
    server.release(req, **retraction())
    assert server.everything_is_back


@pytest.mark.parametrize("settled", [True, False])
def test_the_next_owner_of_a_row_gives_back_its_own_pages(settled: bool) -> None:
    """What the former owner had packed is named by its row on later releases."""
    server = Server(radix=False)
    first, _ = started(server, settled=settled)
    slot = UPSTREAM.slot(first)
    server.release(first, **retraction())
    assert server.everything_is_back
    server.slots.free_slots = [slot]
    second, state = started(server, settled=False)
    assert UPSTREAM.slot(second) == slot
    server.release(second, **retraction())
    assert server.everything_is_back
    assert not state.in_flight
