"""Prompts that are compressed between their chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_kvc.config.pages import floor_tokens
from tests.engine.inprocess import InProcessScheduler, Request
from tests.engine.oracle import TIE, Oracle, Policy, Step, check_few_differ
from tests.engine.texts import prompt
from tests.engine.tracer import PassTracer, shares

CHUNK = 256
BUDGET = 192


@pytest.fixture
def chunked(fresh: InProcessScheduler) -> Iterator[InProcessScheduler]:
    """The scheduler with ``--kv-compress-chunks always``."""
    runtime = fresh.allocator.get_kvcache().runtime
    rule = runtime.chunk_rule
    assert rule.chunk_size == CHUNK
    runtime.chunk_rule = dataclasses.replace(rule, mode="always")
    yield fresh
    runtime.chunk_rule = rule


@pytest.mark.parametrize(
    ("queries", "rest", "policy"),
    [
        ("prompt", 90, Policy()),
        ("prompt", 20, Policy()),
        ("chunk", 90, Policy()),
        ("prompt", 90, Policy(distinct=0)),
    ],
)
def test_every_chunk_keeps_what_the_oracle_keeps(
    queries: str,
    rest: int,
    policy: Policy,
    chunked: InProcessScheduler,
    model_path: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four chunks, the last one short, then one periodic pass.

    With a rest shorter than the window the last probe is short, too.
    """
    runtime = chunked.allocator.get_kvcache().runtime
    options = dataclasses.replace(runtime.options, **dataclasses.asdict(policy))
    monkeypatch.setattr(runtime.state, "options", options)
    monkeypatch.setattr(runtime.pass_scheduler, "probes", queries == "prompt")
    oracle = Oracle(model_path, options)
    length = 3 * CHUNK + rest
    ids = prompt(model_path, 500, length)
    ends = [*range(CHUNK, length, CHUNK), length]
    last_fold = floor_tokens(length) + options.interval
    kv = {"budget": BUDGET, "report_tokens": True}
    with PassTracer(runtime) as tracer:
        request = Request("x", ids, last_fold - length + 3, kv=kv)
        out = chunked.serve([request])["x"]
    (passes,) = tracer.kept.values()
    summary = out.kv[-1]
    assert len(passes) == summary["passes"] == len(ends) + 1
    assert summary["chunk_passes"] == len(ends) - 1
    assert summary["peak_resident_tokens"] <= BUDGET + options.interval + 32

    # Until the prompt is complete every layer keeps as much.
    steps = [
        Step(
            end,
            probe=queries == "prompt" and end < length,
            repeated=queries == "prompt" and CHUNK < end <= length,
            allocation="layer" if end < length else "joint",
        )
        for end in [*ends, last_fold]
    ]
    served = oracle.request(ids, policy)
    differing = served.replay(out.ids, steps, passes, BUDGET, TIE)
    for step, kept in zip(steps, passes, strict=True):
        sizes = torch.tensor([len(own) for own in kept]).view(oracle.layers, -1)
        assert (len(set(sizes.sum(1).tolist())) == 1) == (step.length < length)
    total = len(passes) * BUDGET * oracle.layers * oracle.heads
    check_few_differ(differing, total)
    assert summary["prompt_token_shares"] == shares(passes[-1], length)


def test_only_the_exact_chunk_is_shared(
    chunked: InProcessScheduler, model_path: str
) -> None:
    """Chunks that saw a compressed past are not in the tree, so a hit is lossless.

    The second prompt computes one more chunk over the exact one that it hits.
    """
    ids = prompt(model_path, 4000, 700)
    kv = {"budget": BUDGET}
    hits = []
    for rid, options in (("a", kv), ("b", kv), ("c", {"enabled": False})):
        out = chunked.serve([Request(rid, ids, 8, kv=options)])[rid]
        hits.append(out.cached_tokens)
    assert hits == [0, CHUNK, 2 * CHUNK]
    lossless = out.ids
    chunked.flush()
    out = chunked.serve([Request("d", ids, 8, kv={"enabled": False})])["d"]
    assert out.cached_tokens == 0
    assert out.ids == lossless


def test_memory_of_a_long_prompt_stays_small(
    chunked: InProcessScheduler, model_path: str
) -> None:
    """Used pages never exceed two copies and two chunks; all come back."""
    runtime = chunked.allocator.get_kvcache().runtime
    allocator, free = chunked.allocator, []
    chunked.set_radix(False)
    total = allocator.available_size()
    chunked.on_poll = lambda _: free.append(allocator.available_size())
    ids = prompt(model_path, 0, 2100)
    out = chunked.serve([Request("x", ids, 4, kv={"budget": BUDGET})])["x"]
    assert len(out.ids) == 4
    assert out.kv[-1]["chunk_passes"] == 8
    assert total - min(free) <= runtime.chunk_rule.peak(BUDGET, CHUNK)
    assert allocator.available_size() == total


def test_a_prompt_waits_between_chunks_when_the_pool_is_full(
    chunked: InProcessScheduler, model_path: str
) -> None:
    """Pages taken away for a while: the prompt is put off, then finished."""
    allocator = chunked.allocator
    chunked.set_radix(False)
    passes = allocator.get_kvcache().runtime.pass_scheduler
    held: list[object] = []
    waited: list[bool] = []

    def squeeze(now: int) -> None:
        waited.append(passes.waiting_prompt is not None)
        if 3 <= now < 14:
            # Also what its last chunk is about to give back.
            passes.settle(chunked.sch, passes.launched)
            held.append(allocator.alloc(max(allocator.available_size() - 48, 0)))
        for pages in held if now == 14 else ():
            allocator.free_segment(pages, start_pos=0)

    chunked.on_poll = squeeze
    requests = [
        Request("short", prompt(model_path, 0, 40), max_new=24, kv={"enabled": False}),
        Request("long", prompt(model_path, 100, 900), 4, kv={"budget": 64}, arrive=1),
    ]
    outputs = chunked.serve(requests)
    assert len(outputs["short"].ids) == 24
    assert len(outputs["long"].ids) == 4
    assert outputs["long"].kv[-1]["chunk_passes"] >= 3
    assert sum(waited) > 3


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        ({"enabled": False}, "is not compressed"),
        ({"budget": 8192}, "twice what it keeps"),
    ],
)
def test_what_cannot_fit_is_refused_alone(
    fresh: InProcessScheduler,
    monkeypatch: pytest.MonkeyPatch,
    kv: dict[str, object],
    message: str,
) -> None:
    # The model's context is shorter than the pool; a longer one is simulated.
    pool = fresh.allocator.get_kvcache().size
    monkeypatch.setattr(fresh.sch, "max_req_input_len", 2 * pool)
    monkeypatch.setattr(fresh.sch, "max_req_len", 2 * pool + 5)
    outputs = fresh.serve(
        [
            Request("long", [5] * (pool + 100), max_new=4, kv=kv),
            Request("ok", [7] * 40, max_new=4),
        ]
    )
    finish = outputs["long"].finish
    assert finish is not None
    assert finish["type"] == "abort"
    assert message in finish["message"]
    assert len(outputs["ok"].ids) == 4


def test_a_request_for_no_token_generates_none(fresh: InProcessScheduler) -> None:
    """Scoring a prompt (max_new_tokens 0) stays what it is for a compressed one."""
    out = fresh.serve([Request("score", [7] * 400, max_new=0, kv={"budget": 64})])
    finish = out["score"].finish
    assert finish is not None
    assert finish["type"] == "length"
    assert len(out["score"].ids) <= 1


def test_a_probe_has_its_own_adapters(
    chunked: InProcessScheduler, model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA layers know the rows of the chunk's batch; the probe behind it has others.

    SGLang's LoRA needs a GPU, so its manager is played here.
    """
    runner = chunked.sch.tp_worker.model_runner
    events: list[tuple[str, int]] = []

    def prepare(batch: Any) -> None:
        assert batch.lora_ids == ["adapter"] * len(batch.lora_ids)
        events.append(("prepared", sum(batch.extend_seq_lens_cpu or [1])))

    forward = runner.forward

    def counted(batch: Any, *args: Any, **kwargs: Any) -> Any:
        events.append(("forward", len(batch.input_ids)))
        return forward(batch, *args, **kwargs)

    # SGLang 0.5.23 prepares its own batches wherever there is a manager.
    manager = SimpleNamespace(
        prepare_lora_batch=prepare,
        attn_dp_enabled=False,
        fetch_new_loras=lambda _: None,
    )
    monkeypatch.setattr(runner, "lora_manager", manager, raising=False)
    monkeypatch.setattr(runner, "forward", counted)
    ids = prompt(model_path, 0, 2 * CHUNK + 100)
    request = Request("x", ids, 2, kv={"budget": BUDGET}, lora_id="adapter")
    out = chunked.serve([request])["x"]
    assert out.kv[-1]["chunk_passes"] == 2
    # Behind each chunk but the last: prepared right before a forward of the window.
    window = chunked.allocator.get_kvcache().runtime.options.window
    probes = [at for at, event in enumerate(events) if event == ("forward", window)]
    assert [events[at - 1] for at in probes] == [("prepared", window)] * 2
