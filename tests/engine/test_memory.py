"""Freed memory is real and exact."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import pytest

from sglang_kvc.attention.warmup import SAMPLED, prefill_once
from sglang_kvc.config.pages import ceil_tokens, floor_tokens
from sglang_kvc.eviction.runner import PassRunner
from tests.engine.inprocess import InProcessScheduler, Request
from tests.engine.texts import prompt
from tests.engine.tracer import PassTracer


class SettleProbe:
    """Records the allocator's available tokens around every settling."""

    def __init__(self, scheduler: InProcessScheduler) -> None:
        self.allocator = scheduler.allocator
        self.passes = scheduler.allocator.get_kvcache().runtime.pass_scheduler
        self.seen: list[tuple[Any, int]] = []
        self.original = self.passes.settle

    def __enter__(self) -> SettleProbe:
        self.passes.settle = self._settle
        return self

    def __exit__(self, *exc: Any) -> None:
        self.passes.settle = self.original

    def _settle(self, scheduler: Any, records: Any) -> None:
        open_ones = [it for it in records if not it.closed]
        before = self.allocator.available_size()
        self.original(scheduler, records)
        if open_ones:
            freed = open_ones[0].decision
            self.seen.append((freed, self.allocator.available_size() - before))


@pytest.mark.parametrize("overlap", [True, False])
def test_a_pass_frees_exactly_what_it_folds(
    fresh: InProcessScheduler, model_path: str, overlap: bool
) -> None:
    """Radix cache off: available tokens rise by the page-rounded difference."""
    fresh.set_radix(False)
    fresh.set_overlap(overlap)
    length, budget = 700, 128
    total = fresh.allocator.available_size()
    with SettleProbe(fresh) as probe:
        out = fresh.serve(
            [Request("x", prompt(model_path, 0, length), 40, kv={"budget": budget})]
        )["x"]
    (first, gain), *periodic = probe.seen
    # The fresh pages were taken at launch; settling returns what was read.
    assert gain == floor_tokens(length)
    assert first.packed_new == budget
    assert len(periodic) >= 2
    for decision, gain in periodic:
        assert gain == budget + decision.fold_new - decision.fold_old
    assert fresh.allocator.available_size() == total
    peak = max(summary["resident_tokens"] for summary in out.kv[1:])
    interval = ceil_tokens(probe.passes.options.interval)
    assert peak <= budget + interval + 32


def test_budget_grows_with_the_request_at_a_rate(
    fresh: InProcessScheduler, model_path: str
) -> None:
    """rate X keeps 1/X of the logical length, at every pass."""
    with SettleProbe(fresh) as probe:
        fresh.serve([Request("x", prompt(model_path, 0, 600), 40, kv={"rate": 4})])
    assert [it.packed_new for it, _ in probe.seen] == [
        ceil_tokens(-(-r.seq_len // 4)) for r, _ in probe.seen
    ]
    assert len(probe.seen) >= 3


def test_request_that_outgrows_its_budget_while_decoding(
    fresh: InProcessScheduler, model_path: str
) -> None:
    """A prompt below the budget makes its first pass at budget + interval."""
    with SettleProbe(fresh) as probe:
        out = fresh.serve(
            [Request("x", prompt(model_path, 0, 100), 36, kv={"budget": 112})]
        )["x"]
    (record, _) = probe.seen[0]
    assert record.is_first
    assert record.seq_len == 112 + 16
    assert out.kv[-1]["resident_tokens"] < out.kv[-1]["logical_tokens"]


def test_disabled_request_keeps_everything(
    fresh: InProcessScheduler, model_path: str
) -> None:
    """enabled: false beside a compressed request in the same batch."""
    ids = prompt(model_path, 0, 500)
    off = Request("off", ids, 20, kv={"enabled": False})
    on = Request("on", prompt(model_path, 2000, 500), 20)
    out = fresh.serve([off, on])
    assert out["off"].kv[-1]["resident_tokens"] == out["off"].kv[-1]["logical_tokens"]
    assert out["on"].kv[-1]["passes"] == 2
    fresh.flush()
    assert (
        fresh.serve([Request("r", ids, 20, kv={"rate": 1})])["r"].ids == out["off"].ids
    )


def test_bad_request_fails_alone(fresh: InProcessScheduler, model_path: str) -> None:
    """A wrong option aborts its request with HTTP 400; its neighbour is served."""
    bad = Request("bad", prompt(model_path, 0, 80), 8, kv={"rate": 0.5})
    good = Request("good", prompt(model_path, 0, 80), 8)
    out = fresh.serve([bad, good])
    assert out["bad"].finish is not None
    assert out["bad"].finish["type"] == "abort"
    assert "rate" in out["bad"].finish["message"]
    assert int(out["bad"].finish["status_code"]) == 400
    assert len(out["good"].ids) == 8


@pytest.mark.parametrize("changed", [{}, {"head_floor": 64}, {"layer_share": 0.0}])
def test_warm_up_leaves_the_padding_slot_empty(
    fresh: InProcessScheduler,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, float],
) -> None:
    """What compiles the kernels on a GPU runs here too, and leaves no trace."""
    runtime = fresh.allocator.get_kvcache().runtime
    options = dataclasses.replace(runtime.options, **changed)
    monkeypatch.setattr(runtime.state, "options", options)
    PassRunner(runtime.state, runtime.passes.sm_scale).warm_up(chunks=True)
    assert not runtime.state.tables.fold_lens[0]
    assert not runtime.state.tables.block_offsets[0].any()


@pytest.mark.parametrize("sampling", [{}, *SAMPLED])
def test_the_warm_up_prefill_gives_everything_back(
    fresh: InProcessScheduler, sampling: dict[str, float]
) -> None:
    scheduler = fresh.sch
    slots = scheduler.req_to_token_pool
    before = fresh.allocator.available_size(), slots.available_size()
    prefill_once(scheduler, 40, **sampling)
    assert (fresh.allocator.available_size(), slots.available_size()) == before
    tree = fresh.sch.tree_cache
    assert tree.evictable_size() + tree.protected_size() == 0
    assert scheduler.is_fully_idle()


@pytest.mark.parametrize("overlap", [True, False])
def test_what_every_head_keeps_is_reported_on_request(
    fresh: InProcessScheduler, model_path: str, overlap: bool
) -> None:
    fresh.set_overlap(overlap)
    runtime = fresh.allocator.get_kvcache().runtime
    ids = prompt(model_path, 0, 400)
    kv = {"budget": 128}
    requests = [
        Request("told", ids, 40, kv={**kv, "report_heads": True}),
        Request("not", ids[:300], 40, kv=kv),
    ]
    with PassTracer(runtime) as tracer:
        out = fresh.serve(requests)
    kept = [passes[-1] for passes in tracer.kept.values()]
    told = out["told"].kv[-1]["packed_tokens_per_head"]
    assert told in [[len(positions) for positions in heads] for heads in kept]
    assert sum(told) == 128 * runtime.state.arena.heads_per_page
    assert "packed_tokens_per_head" not in out["not"].kv[-1]


def test_requests_are_freed_without_the_garbage_collector(
    fresh: InProcessScheduler, model_path: str
) -> None:
    """Nothing of ours closes a circle: in a large process the collector hardly runs.

    Then every request stays for minutes, with its tokens and its lists on the device.
    """
    options: list[Any] = [
        *(
            None,
            {"rate": 8},
            {"budget": 96, "report_heads": True, "report_tokens": True},
        ),
        *({"enabled": False}, {"rate": -1}),
    ]

    def load(name: str) -> list[Request]:
        return [
            Request(f"{name}{i}", prompt(model_path, i, 60 + 70 * i), 12, kv=kv)
            for i, kv in enumerate(options * 2)
        ]

    fresh.serve(load("first"))
    gc.collect()
    gc.disable()
    try:
        fresh.serve(load("second"))
        fresh.serve([Request("last", prompt(model_path, 0, 40), 2)])
        alive = [o.rid for o in gc.get_objects() if type(o).__name__ == "Req"]
    finally:
        gc.enable()
    # SGLang and the list of the last passes may still name those of the last step.
    assert not [rid for rid in alive if rid.startswith("second")]
