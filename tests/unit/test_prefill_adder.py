"""The class that admits: before SGLang's own, or before that of another plugin."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_policy import AddReqResult

from sglang_kvc.memory.kv_pool import ArenaKVPool
from sglang_kvc.requests.request_options import RequestOptions
from sglang_kvc.scheduling.chunking import ChunkRule
from sglang_kvc.scheduling.headroom import growth_bound
from sglang_kvc.scheduling.policy import RequestPolicy
from sglang_kvc.scheduling.prefill_adder import admitting
from sglang_kvc.upstream.generation import UPSTREAM, Generation22
from tests.unit.test_headroom import OPTIONS, POOL, Adder, candidate, running

STOCK_CHARGE = 400.0


class Theirs:
    """An adder of another plugin; notes what reaches it."""

    def _get_running_request_total_token_offset(self, req: Any) -> float:
        self.reached.append(("offset", req, {}))
        return STOCK_CHARGE

    def add_one_req(self, req: Any, **kwargs: Any) -> Any:
        self.reached.append(("one", req, kwargs))
        return self.add(req)

    def add_chunked_req(self, req: Any) -> Any:
        self.reached.append(("chunked", req, {}))
        return "stock"

    def preempt_to_schedule(self, req: Any) -> bool:
        self.reached.append(("preempt", req, {}))
        self.preempt_list.append("victim")
        return True


class TheirAdder(Theirs, Adder):
    """With the memory of a server."""

    def __init__(self, running: list[Any], used: int = 0) -> None:
        super().__init__(running, used)
        self.reached: list[Any] = []
        pool = SimpleNamespace(runtime=self.server)
        self.token_to_kv_pool_allocator.get_kvcache = lambda: pool


def foreign() -> Any:
    """A request that did not come through our queue hook."""
    return SimpleNamespace(**vars(candidate()) | {"kv_compress_policy": None})


def test_a_request_that_is_not_ours_reaches_their_methods_unchanged() -> None:
    req = foreign()
    adder = admitting(TheirAdder)([])
    adder.running_batch.reqs = [req]
    extra = {"has_chunked_req": True, "truncation_align_size": None}
    assert adder._get_running_request_total_token_offset(req) == STOCK_CHARGE
    assert adder.add_one_req(req, **extra) is AddReqResult.CONTINUE
    assert adder.add_chunked_req(req) == "stock"
    assert adder.preempt_to_schedule(req) is True
    assert adder.reached == [
        ("offset", req, {}),
        ("one", req, extra),
        ("chunked", req, {}),
        # What preempted requests can still grow to is asked first.
        ("offset", req, {}),
        ("preempt", req, {}),
    ]


def test_a_compressed_request_is_charged_what_it_grows_by() -> None:
    adder, req = admitting(TheirAdder)([]), running(1, tail=40)
    charge = adder._get_running_request_total_token_offset(req)
    assert charge == growth_bound(req, STOCK_CHARGE) < STOCK_CHARGE


def test_a_prompt_without_room_does_not_reach_their_methods() -> None:
    full = admitting(TheirAdder)([running(1, tail=0)], used=POOL - 64)
    assert full.add_one_req(candidate()) is AddReqResult.NO_TOKEN
    assert full.reached == []


def test_a_started_prompt_waits_for_memory() -> None:
    prompt = candidate(length=3 * POOL)
    rule = ChunkRule(mode="always", pool_tokens=POOL, chunk_size=8_192, window=32)
    prompt.kv_compress_policy = RequestPolicy(OPTIONS, RequestOptions(), rule)
    adder = admitting(TheirAdder)([running(1, tail=0)], used=POOL - 64)
    adder.passes.waiting_prompt = None
    assert adder.add_chunked_req(prompt) is prompt
    assert (adder.reached, adder.rem_chunk_tokens) == ([], 0)
    assert adder.passes.waiting_prompt is prompt


def test_who_was_preempted_is_remembered() -> None:
    adder = admitting(TheirAdder)([])
    assert adder.preempt_to_schedule(candidate())
    assert adder.passes.preempted == ["victim"]


def test_every_round_has_the_same_class_before_theirs() -> None:
    """SGLang asks once a step; a new class each time would be garbage in circles."""
    assert admitting(TheirAdder) is admitting(TheirAdder)
    assert issubclass(admitting(TheirAdder), TheirAdder)
    assert admitting(Theirs) is not admitting(TheirAdder)


@pytest.mark.skipif(
    not isinstance(UPSTREAM, Generation22),
    reason="SGLang 0.5.17 does not ask for the class; hooks stand on its methods",
)
def test_sglang_takes_our_class_only_for_a_pool_of_ours() -> None:
    from sglang.srt.managers.schedule_policy import PrefillAdder
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.plugins import load_plugins

    load_plugins()
    ours = ArenaKVPool.__new__(ArenaKVPool)
    ours.runtime = object()

    def taken(pool: Any) -> type:
        allocator = SimpleNamespace(get_kvcache=lambda: pool)
        scheduler = SimpleNamespace(token_to_kv_pool_allocator=allocator)
        return Scheduler.get_prefill_adder_class(scheduler)

    assert taken(object()) is PrefillAdder
    assert taken(ours) is admitting(PrefillAdder)
    assert issubclass(taken(ours), PrefillAdder)
