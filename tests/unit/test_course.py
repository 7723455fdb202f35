"""What is accepted runs alone, what is refused could not: drawn, not picked.

`KVC_ADMISSION_CASES` sets how many cases are drawn (2,000 in CI).
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sglang.srt.managers import schedule_policy
from sglang.srt.managers.schedule_policy import AddReqResult

from sglang_kvc.scheduling import acceptance
from sglang_kvc.scheduling.attached import refusal_of
from sglang_kvc.scheduling.course import Way, course
from tests.unit.lonely_request import (
    PAGE,
    Case,
    Server,
    chunks_serve,
    stock_serves,
    walk,
)

CASES = int(os.environ.get("KVC_ADMISSION_CASES", "2000"))
drawn = settings(
    max_examples=CASES,
    deadline=None,
    derandomize=CASES <= 2000,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@st.composite
def cases(draw: Any) -> Case:
    """Servers of 512 to 65,536 tokens, with lengths around what they can hold."""
    pool = PAGE * draw(st.integers(32, 512) | st.integers(512, 4096))
    window = draw(st.sampled_from([1, 16, 32, 64, 256]))
    interval = draw(st.sampled_from([1, 16, 50, 64, 256]))
    near = st.sampled_from([-40, -33, -32, -17, -16, -6, -1, 0, 1, 15, 16, 17, 33])
    edge = st.builds(
        lambda n, d, off: max(n * pool // d + off, 1),
        st.integers(1, 8),
        st.sampled_from([1, 2, 3, 4, 8]),
        near,
    )
    context = draw(st.sampled_from([pool // 2, pool, 2 * pool, 8 * pool]))
    prompt = draw(edge | st.integers(1, 2 * pool) | st.integers(1, 200))
    prompt = min(prompt, context - 7)
    rate = st.sampled_from([1, 1.01, 1.1, 1.5, 2, 3, 4, 8, 64]) | st.floats(1, 100)
    kv = draw(
        st.just({})
        | st.just({"enabled": False})
        | st.builds(lambda r: {"rate": r}, rate)
        | st.builds(lambda b: {"budget": max(b, 48)}, edge | st.integers(48, 2 * pool))
        | st.just({"budget": 1 << 30})
    )
    return Case(
        pool=pool,
        context=context,
        chunk=draw(st.sampled_from([-1, 64, 256, 512, 2048, 8192])),
        mode=draw(st.sampled_from(["auto", "always", "never"])),
        folded=draw(st.booleans()),
        radix=draw(st.booleans()),
        window=window,
        interval=interval,
        min_budget=draw(st.sampled_from([48, 128, 512, 4096])),
        rate=draw(rate),
        prompt=prompt,
        asked=draw(st.integers(0, 300) | edge | st.just(1 << 30)),
        cached=draw(st.just(0) | st.integers(0, prompt) | st.just(2 * prompt)),
        kv=kv,
        ignore_eos=draw(st.booleans()),
        ring=draw(st.sampled_from([0, 16, 32, 64, 256])),
    )


def serve_alone(case: Case) -> None:
    """The property; an AssertionError names what is accepted and does not run."""
    server = Server(case)
    req = server.request()
    length = len(req.origin_input_ids)
    refusal = refusal_of(req)
    if refusal is not None:
        assert not stock_serves(case), refusal
        budget = req.kv_compress_policy.budget(length)
        assert not chunks_serve(case, budget), refusal
        message = refusal.message
        assert str(length) in message and str(case.pool) in message
        return
    way = acceptance.course_of(req)
    assert way is not None
    if not stock_serves(case) and length + PAGE >= case.pool:
        assert way.way is Way.BETWEEN
    server.cache(case.cached)
    assert server.admit(req) is AddReqResult.CONTINUE, way
    assert walk(case, req) <= case.pool
    # At least what SGLang gives without compression, beside a ring if that takes one.
    paged = -(-length // PAGE) * PAGE
    stock = min(case.asked, case.context - length - 2)
    whole = min(stock, case.pool - paged - PAGE - 1)
    horizon = schedule_policy.CLIP_MAX_NEW_TOKENS
    ring = course(req.kv_compress_policy, length, max(whole, 0), horizon)
    pool = case.pool - (ring.ring if ring is not None else way.ring)
    stock = min(stock, pool - paged - PAGE - 1)
    assert req.sampling_params.max_new_tokens >= stock


@drawn
@given(cases())
@example(Case(1280, 8192, 512, "auto", True, True, 32, 64, 512, 4, 2170, 32, 0))
@example(Case(1280, 8192, 512, "auto", True, True, 32, 64, 48, 4, 800, 32, 800))
@example(Case(1280, 8192, 512, "auto", True, True, 32, 64, 48, 4, 1100, 32, 620))
@example(Case(1280, 8192, 512, "auto", True, True, 32, 64, 48, 1.5, 1000, 32, 960))
@example(Case(1280, 8192, -1, "never", False, True, 32, 64, 48, 4, 1100, 32, 0))
@example(Case(1280, 8192, 64, "never", False, True, 32, 64, 48, 4, 1100, 32, 1100))
@example(Case(20480, 131072, 8192, "auto", True, True, 32, 64, 512, 4, 38000, 500, 0))
@example(Case(20480, 131072, 8192, "auto", True, True, 32, 64, 512, 4, 16000, 9, 10000))
@example(Case(896, 896, -1, "auto", False, False, 1, 1, 48, 1.1, 258, 856, 0, ring=16))
def test_what_is_accepted_runs_alone(case: Case) -> None:
    serve_alone(case)


ANSWERS = st.integers(1, 400) | st.sampled_from([16, 1024, 5000, 1 << 30])


def with_answer(case: Case, answer: int) -> Case:
    """The case with an answer that stays whole, and no ring.

    The limit of an answer is found with a ring, which a request that is cut to it may
    turn out not to take.
    """
    asks = case.kv.get("enabled", True)
    kv = {**case.kv, "answer": answer} if asks else case.kv
    return dataclasses.replace(case, kv=kv, ring=0)


@settings(drawn, max_examples=CASES // 4)
@given(cases(), ANSWERS)
@example(Case(1280, 8192, 512, "auto", True, True, 32, 64, 64, 4, 1000, 600, 0), 512)
def test_what_keeps_its_answer_whole_runs_alone(case: Case, answer: int) -> None:
    serve_alone(with_answer(case, answer))


@settings(drawn, max_examples=CASES // 4)
@given(cases(), st.floats(0, 1), ANSWERS)
def test_a_retracted_answer_comes_back_whole(
    case: Case, part: float, answer: int
) -> None:
    come_back(with_answer(case, answer), part)


DELAYS = st.sampled_from([1, 15, 16, 32, 33, 200, 4096])


def with_delay(case: Case, delay: int) -> Case:
    """The case with a first pass that waits, and no ring, as `with_answer`."""
    asks = case.kv.get("enabled", True)
    kv = {**case.kv, "delay": delay} if asks else case.kv
    return dataclasses.replace(case, kv=kv, ring=0)


@settings(drawn, max_examples=CASES // 2)
@given(cases(), DELAYS, st.none() | ANSWERS)
@example(Case(2560, 8192, 512, "auto", True, True, 32, 64, 64, 4, 1000, 600, 0), 32, 64)
def test_what_waits_for_its_answer_runs_alone(
    case: Case, delay: int, answer: int | None
) -> None:
    """As long as it does without a delay: what would end before, does not wait."""
    if answer is not None:
        case = with_answer(case, answer)
    case = dataclasses.replace(case, ring=0)
    plain = Server(case).request()
    late = with_delay(case, delay)
    serve_alone(late)
    req = Server(late).request()
    assert (refusal_of(req) is None) == (refusal_of(plain) is None)
    if refusal_of(plain) is None:
        # On its way into the queue it is judged again, with its delay.
        assert acceptance.readmit(plain) is acceptance.readmit(req) is None
        most = plain.sampling_params.max_new_tokens
        assert req.sampling_params.max_new_tokens == most


@settings(drawn, max_examples=CASES // 2)
@given(cases(), st.floats(0, 1), DELAYS)
def test_what_waited_and_is_retracted_comes_back(
    case: Case, part: float, delay: int
) -> None:
    come_back(with_delay(case, delay), part)


@drawn
@given(cases(), st.floats(0, 1))
@example(
    Case(18656, 37312, -1, "auto", False, False, 1, 1, 48, 1.1, 1, 1 << 30, 0), 0.75
)
def test_what_is_retracted_comes_back_or_is_told_why(case: Case, part: float) -> None:
    come_back(case, part)


def come_back(case: Case, part: float) -> None:
    """The property of a request that has decoded `part` of its answer."""
    server = Server(case)
    req = server.request()
    if refusal_of(req) is not None:
        return
    asked = req.sampling_params.max_new_tokens
    done = max(int(part * asked) - 1, 0)
    if done + len(req.origin_input_ids) > 4 * case.pool:
        return
    req.output_ids.extend(range(2, done + 2))
    length = len(req.origin_input_ids) + done
    refusal = acceptance.readmit(req)
    if refusal is not None:
        assert length + PAGE + 1 >= case.pool
        budget = req.kv_compress_policy.budget(length)
        assert not chunks_serve(Case(**{**vars(case), "prompt": length}), budget), (
            refusal
        )
        assert str(length) in refusal.message
        return
    left = req.sampling_params.max_new_tokens - done
    assert 0 <= left <= asked - done
    if asked > done and length + PAGE + 1 < case.pool:
        assert left > 0
    server.cache(case.cached)
    assert server.admit(req) is AddReqResult.CONTINUE, acceptance.course_of(req)
    assert walk(case, req) <= case.pool
