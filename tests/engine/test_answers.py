"""An answer that stays whole beside the prompt's budget keeps what the oracle keeps."""

from __future__ import annotations

import pytest

from sglang_kvc.config.pages import ceil_tokens, floor_tokens
from tests.engine.inprocess import InProcessScheduler, Request
from tests.engine.oracle import TIE, Oracle, Step, check_few_differ
from tests.engine.texts import prompt
from tests.engine.tracer import PassTracer

ANSWER = 48
PROMPT = 333
FOLD = floor_tokens(PROMPT)
INTERVAL = 16
PASSES = 4
"""Behind the prompt, and while decoding."""


@pytest.mark.parametrize("kv", [{"budget": 80}, {"rate": 4}], ids=str)
def test_kept_positions_equal_the_oracle(
    fresh: InProcessScheduler, model_path: str, kv: dict[str, int]
) -> None:
    """The last pages of the answer in every head, the rest by score."""
    runtime = fresh.allocator.get_kvcache().runtime
    ids = prompt(model_path, 7_000, PROMPT)
    most = FOLD + ANSWER + PASSES * INTERVAL - PROMPT + 3
    with PassTracer(runtime) as tracer:
        request = Request("x", ids, most, kv={**kv, "answer": ANSWER})
        out = fresh.serve([request])["x"]
    ((slot, passes),) = tracer.kept.items()
    lengths = tracer.lengths[slot]
    # Nothing happens while the answer is whole; the next pass is an interval later.
    assert lengths[:2] == [PROMPT, FOLD + ANSWER + INTERVAL]
    assert len(lengths) > 2

    steps = []
    for length in lengths:
        share = 0 if length == PROMPT else ANSWER
        others = max(PROMPT, length - ANSWER)
        budget = kv.get("budget", max(-(-others // kv.get("rate", 1)), 64))
        steps.append(
            Step(
                length,
                budget=ceil_tokens(budget) + share,
                protected=max(share, runtime.options.protected),
            )
        )
    oracle = Oracle(model_path, runtime.options)
    served = oracle.request(ids, slot=slot)
    differing = served.replay(out.ids, steps, passes, 0, TIE)
    total = sum(step.budget for step in steps) * oracle.layers * oracle.heads
    check_few_differ(differing, total)
    for length, kept in zip(lengths[1:], passes[1:], strict=True):
        whole = set(range(length - ANSWER, floor_tokens(length)))
        assert all(whole <= set(positions) for positions in kept)
    # What is older competes: some head has lost some of it.
    older = set(range(PROMPT, lengths[-1] - ANSWER))
    assert any(older - set(positions) for positions in passes[-1])


def test_a_short_answer_leaves_the_prompt_alone(
    fresh: InProcessScheduler, model_path: str
) -> None:
    """One pass, and every token decoded since is there."""
    ids = prompt(model_path, 8_000, PROMPT)
    kv = {"budget": 80, "answer": ANSWER}
    out = fresh.serve([Request("x", ids, ANSWER, kv=kv)])["x"]
    told = out.kv[-1]
    assert told["passes"] == 1
    decoded = told["logical_tokens"] - FOLD
    assert told["resident_tokens"] == 80 + decoded
    assert told["budget_tokens"] == 80 + floor_tokens(decoded)
    # From the first step on, half of the steps before the last.
    first = 80 + PROMPT + 1 - FOLD
    assert abs(told["mean_resident_tokens"] - (first + 80 + decoded) / 2) <= 1
