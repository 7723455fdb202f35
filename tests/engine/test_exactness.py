"""The served engine keeps exactly what a slow, independent oracle keeps."""

from __future__ import annotations

import pytest

from sglang_kvc.config.pages import floor_tokens
from tests.engine.inprocess import InProcessScheduler, Request
from tests.engine.oracle import TIE, Oracle, Step, check_few_differ
from tests.engine.texts import prompt
from tests.engine.tracer import PassTracer, shares

PASSES_AFTER_PREFILL = 2


@pytest.fixture(scope="module")
def oracle(model_path: str, scheduler: InProcessScheduler) -> Oracle:
    options = scheduler.allocator.get_kvcache().runtime.options
    return Oracle(model_path, options)


@pytest.mark.parametrize(
    ("start", "length", "budget"), [(0, 500, 128), (900, 1500, 384), (3000, 3000, 512)]
)
def test_kept_positions_equal_the_oracle(
    fresh: InProcessScheduler,
    oracle: Oracle,
    model_path: str,
    start: int,
    length: int,
    budget: int,
) -> None:
    """After prefill and after two periodic passes, in every layer and head.

    The client is told so, token by token.
    """
    runtime = fresh.allocator.get_kvcache().runtime
    interval = runtime.options.interval
    ids = prompt(model_path, start, length)
    with PassTracer(runtime) as tracer:
        # Passes are due when the tail holds one interval of whole pages.
        new = floor_tokens(length) + PASSES_AFTER_PREFILL * interval - length + 4
        kv = {"budget": budget, "report_tokens": True}
        out = fresh.serve([Request("x", ids, max_new=new, kv=kv)])["x"]
    (passes,), (lengths,) = tracer.kept.values(), tracer.lengths.values()
    assert out.kv[-1]["passes"] == len(passes)
    folds = [
        floor_tokens(length) + i * interval for i in range(PASSES_AFTER_PREFILL + 1)
    ]
    assert lengths == [length, *folds[1:]]

    steps = [Step(length) for length in lengths]
    differing = oracle.request(ids).replay(out.ids, steps, passes, budget, TIE)
    total = len(passes) * budget * oracle.layers * oracle.heads
    check_few_differ(differing, total)
    # The budget is really dealt out unevenly, else this test shows little.
    assert len({len(positions) for positions in passes[0]}) > 3
    assert out.kv[-1]["prompt_token_shares"] == shares(passes[-1], length)
    assert all("prompt_token_shares" not in kv for kv in out.kv[:-1])
