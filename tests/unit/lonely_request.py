"""One request alone on a server of any size: real admission, then page by page.

Nothing here uses `scheduling.course`, which is what is judged: the tree, the allocator
and the adder are SGLang's own with our hooks, and the walk counts pages.
"""

from __future__ import annotations

import importlib
from array import array
from dataclasses import dataclass, field
from math import inf
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from sglang.srt.managers import schedule_policy
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import AddReqResult
from sglang.srt.mem_cache.base_prefix_cache import InsertParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.plugins import load_plugins
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_kvc.config.options import KVCompressOptions
from sglang_kvc.memory.cpu_allocator import TorchPagedAllocator
from sglang_kvc.memory.kv_pool import ArenaKVPool
from sglang_kvc.scheduling import acceptance
from sglang_kvc.scheduling.chunking import ChunkRule
from sglang_kvc.scheduling.passes import PassScheduler
from sglang_kvc.scheduling.request_state import RequestState
from sglang_kvc.scheduling.rings import Ring, Rings
from sglang_kvc.scheduling.turns import Turns
from sglang_kvc.sessions.snapshot import Hit
from sglang_kvc.upstream.generation import UPSTREAM, Generation22
from tests.doubles import adder_class, tree_of

PAGE = 16
MAX_PREFILL = 16384
# Asked by the adder of settings that only a started server has.
SETTINGS: dict[str, Any] = {
    "is_dsa_prefill_cp_in_seq_split": lambda: False,
    "is_prefill_context_parallel_enabled": lambda: False,
}
if isinstance(UPSTREAM, Generation22):
    # The second is read only where another test's scheduler has published settings.
    EXEC = SimpleNamespace(
        features=SimpleNamespace(enable_encoder_swa_bounded_replay=False),
        mamba=SimpleNamespace(enable_mamba_extra_buffer=False),
    )
    SETTINGS = {"get_exec": lambda: EXEC}


@dataclass(frozen=True)
class Case:
    """A server and a request, drawn together."""

    pool: int
    context: int
    chunk: int
    mode: str
    folded: bool
    radix: bool
    window: int
    interval: int
    min_budget: int
    rate: float
    prompt: int
    asked: int
    cached: int
    kv: dict[str, Any] = field(default_factory=dict)
    ignore_eos: bool = True
    ring: int = 0

    def options(self) -> KVCompressOptions:
        """The server's options."""
        return KVCompressOptions(
            rate=self.rate,
            min_budget=self.min_budget,
            window=self.window,
            interval=self.interval,
        )

    def rule(self) -> ChunkRule:
        """As `KVCompressRuntime` makes it."""
        chunk = max(self.chunk, 0) if self.folded else 0
        return ChunkRule(self.mode, self.pool, chunk, self.window)


class Server:
    """The host side of an idle server: tree, allocator, options."""

    def __init__(self, case: Case) -> None:
        load_plugins()
        # Our hooks on admission come with it.
        importlib.import_module("sglang.srt.managers.scheduler")
        self.case = case
        scheduler = PassScheduler(case.options(), 3, ring_tokens=case.ring)
        self.runtime = SimpleNamespace(
            options=case.options(),
            chunk_rule=case.rule(),
            turns=Turns(),
            pass_scheduler=scheduler,
            page_list_width=-(-case.context // PAGE),
        )
        # Without the memory of one: hooks ask the pool whether the feature is on.
        pool = ArenaKVPool.__new__(ArenaKVPool)
        pool.runtime = self.runtime
        self.allocator = TorchPagedAllocator(
            case.pool, PAGE, torch.float32, "cpu", pool, need_sort=False
        )
        params = CacheInitParams(
            disable=not case.radix,
            req_to_token_pool=None,
            token_to_kv_pool_allocator=self.allocator,
            page_size=PAGE,
        )
        self.tree = tree_of(params)

    def request(self, first: int = 2) -> Any:
        """The request as it enters, with SGLang's limits and ours.

        Its prompt is made of token ids from `first` on.
        """
        case = self.case
        params = SamplingParams(
            max_new_tokens=case.asked,
            ignore_eos=case.ignore_eos,
            custom_params={"kv_compress": case.kv} if case.kv else None,
        )
        ids = array("q", range(first, first + case.prompt))
        req = Req("r", None, ids, params, vocab_size=1 << 20)
        max_req_len = case.context - 1
        # SGLang's own limits, `Scheduler.init_req_max_new_tokens`.
        paged = -(-case.prompt // PAGE) * PAGE
        most = min(max_req_len - case.prompt - 1, case.pool - paged - PAGE - 1)
        params.max_new_tokens = max(0, min(case.asked, most))
        acceptance.limit_request(req, self.runtime, case.asked, max_req_len)
        return req

    def cache(self, tokens: int) -> None:
        """Leave the first `tokens` of the prompt in the tree, as an earlier request."""
        tokens = min(tokens, self.case.pool) // PAGE * PAGE
        if self.case.radix and tokens:
            ids = array("q", range(2, tokens + 2))
            value = self.allocator.alloc(tokens)
            self.tree.insert(InsertParams(key=RadixKey(ids, None), value=value))

    def admit(self, req: Any) -> AddReqResult:
        """One round of admission with nothing else running."""
        req.init_next_round_input(self.tree)
        chunk = self.case.chunk if self.case.chunk > 0 else None
        scheduler = SimpleNamespace(token_to_kv_pool_allocator=self.allocator)
        with mock.patch.multiple(schedule_policy, **SETTINGS):
            adder = adder_class(scheduler)(
                PAGE, self.tree, self.allocator, None, 0.7, MAX_PREFILL, chunk
            )
            result = adder.add_one_req(req, False, None)
        return AddReqResult.CONTINUE if req in adder.can_run_list else result


def walk(case: Case, req: Any, hit: Hit | None = None) -> int:
    """Serve an admitted request to its end on an empty pool, counting pages.

    Parameters
    ----------
    case, req : the server, and the request.
    hit : the snapshot that it starts from; its pages count as the request's.

    Returns
    -------
    int
        Most tokens of pages held at once.

    Raises
    ------
    AssertionError
        If the pool runs out, or a pass that should run finds no pages.
    """
    policy, way = req.kv_compress_policy, acceptance.course_of(req)
    chunk, wants = way.chunk, way.ring > 0
    state = RequestState(policy=policy, kv=None, slot=1, chunk=chunk, wants_ring=wants)
    if wants:
        state.ring = Ring(range(case.ring), Rings(case.ring))
    if hit is not None:
        state.resume(hit)
    length, peak = UPSTREAM.prefix_len(req), 0
    end = len(req.full_untruncated_fill_ids)
    step = chunk or (case.chunk if case.chunk > 0 else MAX_PREFILL * 64)
    while length < end:
        length = min(length + step, end)
        peak = max(peak, _held(state, length))
        assert peak <= case.pool, ("prefill", length, peak)
        if length == end or chunk:
            peak = max(peak, _pass(case, state, length, end))
    left = req.sampling_params.max_new_tokens - len(req.output_ids)
    due, last = _due(state, length), length + max(left - 1, 0)
    while length < last:
        page_end = (length // PAGE + 1) * PAGE
        length = min(page_end + 1, due, last) if page_end < last else min(due, last)
        peak = max(peak, _held(state, length))
        assert peak <= case.pool, ("decode", length, peak)
        if length >= due:
            peak = max(peak, _pass(case, state, length, None))
            due = _due(state, length)
            assert due > length
    return peak


def _due(state: RequestState, length: int) -> float:
    due = state.next_due(length)
    return inf if due is None else due


def _held(state: RequestState, length: int) -> int:
    return -(-state.resident(length) // PAGE) * PAGE + state.ring_tokens


def _pass(case: Case, state: RequestState, length: int, end: int | None) -> int:
    """Run the pass that is due, if it is worth it; tokens held while it runs."""
    if end is None:
        decision = state.propose_while_decoding(length)
    else:
        decision = state.propose_after_chunk(length, end)
    if decision is None:
        return 0
    held = _held(state, length) + decision.packed_new
    # `PassScheduler._take_pages` keeps a page for each running request.
    assert held + PAGE <= case.pool, ("deferred", length, held)
    state.launch(decision, None, None)
    return held


def stock_serves(case: Case) -> bool:
    """Whether SGLang without compression would admit this prompt alone."""
    return case.prompt + PAGE < case.pool and case.prompt < min(
        case.context - 6, case.pool - 6
    )


def chunks_serve(case: Case, budget: int) -> bool:
    """Whether two copies and any legal chunk fit, said in another way than the code."""
    rule = case.rule()
    if rule.mode == "never" or not rule.chunk_size or budget >= case.prompt:
        return False
    chunks = range(-(-rule.min_chunk // PAGE) * PAGE, rule.chunk_size + 1, PAGE)
    return any(
        2 * budget + chunk + 4 * PAGE + PAGE < case.pool - case.ring
        and budget + chunk < case.prompt
        for chunk in chunks
    )
