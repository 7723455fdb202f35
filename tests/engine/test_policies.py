"""Every metric, allocation and floor keeps what the slow oracle keeps.

One short prompt each, other text for every case: a pass behind the prefill and a
periodic one. ``KVC_PROMPTS`` serves more of them (20 take some 15 minutes on one core);
``-rP`` shows how many near-ties went the other way::

    KVC_PROMPTS=20 python -m pytest -rP tests/engine/test_policies.py
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import pytest

from sglang_kvc.config.metrics import ATTENTION_METRICS
from sglang_kvc.config.pages import ceil_tokens, floor_tokens
from sglang_kvc.eviction.runner import PassRunner
from sglang_kvc.kernels.layout import PAGE_SIZE
from tests.engine.inprocess import InProcessScheduler, Request
from tests.engine.oracle import TIE, Oracle, Policy, Step, check_few_differ
from tests.engine.texts import prompt
from tests.engine.tracer import PassTracer

PROMPTS = int(os.environ.get("KVC_PROMPTS", "1"))
# What needs no sum is exact.
EXACT = ("recency", "random")

POLICIES = [
    Policy(),
    *(Policy(metric, distinct=0, layer_share=0) for metric in ATTENTION_METRICS),
    *(Policy(metric, layer_share=0) for metric in ("key_similarity", *EXACT)),
    Policy(allocation="layer", distinct=0),
    Policy(allocation="head", distinct=0),
    # Four blocks; sinks and protected tokens alone keep three.
    Policy(head_floor=60, distinct=0, layer_share=0),
    Policy(layer_share=0.8, distinct=0),
    Policy(distinct=0.5, layer_share=0),
    Policy(aging=0.25),
]
STRIDE = 512


@pytest.fixture(scope="module")
def oracle(model_path: str, scheduler: InProcessScheduler) -> Oracle:
    options = scheduler.allocator.get_kvcache().runtime.options
    return Oracle(model_path, options)


@pytest.fixture(
    params=POLICIES,
    ids=lambda p: "-".join(map(str, dataclasses.astuple(p))),
)
def policy(
    fresh: InProcessScheduler, request: pytest.FixtureRequest
) -> Iterator[Policy]:
    """A policy that the live scheduler follows, as if started with it."""
    runtime = fresh.allocator.get_kvcache().runtime
    before = runtime.options, runtime.passes
    runtime.state.options = dataclasses.replace(
        runtime.options, **dataclasses.asdict(request.param)
    )
    runtime.passes = PassRunner(runtime.state, runtime.passes.sm_scale)
    yield request.param
    runtime.state.options, runtime.passes = before


def test_kept_positions_equal_the_oracle(
    fresh: InProcessScheduler, oracle: Oracle, model_path: str, policy: Policy
) -> None:
    """In both passes, in every layer and head."""
    runtime = fresh.allocator.get_kvcache().runtime
    differing = total = 0
    for i in range(PROMPTS):
        number = POLICIES.index(policy) * PROMPTS + i
        length, budget = 300 + 61 * number % 200, 96 + 16 * (number % 3)
        ids = prompt(model_path, STRIDE * number, length)
        last = floor_tokens(length) + runtime.options.interval
        with PassTracer(runtime) as tracer:
            request = Request("x", ids, last - length + 3, kv={"budget": budget})
            out = fresh.serve([request])["x"]
        ((slot, passes),) = tracer.kept.items()
        assert tracer.lengths[slot] == [length, last]
        for kept in passes:
            _check_shares(policy, kept, budget, oracle)

        served, steps = oracle.request(ids, policy, slot), [Step(length), Step(last)]
        tie = 0 if policy.metric in EXACT else TIE
        differing += served.replay(out.ids, steps, passes, budget, tie)
        total += len(passes) * budget * oracle.layers * oracle.heads
    print(f"{PROMPTS} prompts: {differing} of {total} kept KVs differ, all near-ties")
    check_few_differ(differing, total)


def _check_shares(
    policy: Policy, kept: list[list[int]], budget: int, oracle: Oracle
) -> None:
    """The budget is dealt out as the policy says, and unevenly where it may be."""
    sizes = [len(positions) for positions in kept]
    heads = oracle.heads
    layers = {sum(sizes[i : i + heads]) for i in range(0, len(sizes), heads)}
    # Recency prices all heads alike.
    level = policy.metric == "recency"
    assert (set(sizes) == {budget}) == (level or policy.allocation == "head")
    assert (layers == {budget * heads}) == (level or policy.allocation != "joint")
    if policy.head_floor:
        assert min(sizes) == ceil_tokens(policy.head_floor)
    if share := policy.options.least_layer_share:
        least = int(share * (budget // PAGE_SIZE)) * PAGE_SIZE * heads
        # A small share binds no layer of so small a budget.
        assert min(layers) == least if share > 0.5 else min(layers) >= least
        assert min(layers) < budget * heads
