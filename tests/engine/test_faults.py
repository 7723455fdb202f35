"""Every fault that once stopped, hung or starved the server, by its line in a review.

A: the server dies. B: a request is accepted that can never be admitted. C: wrong or
unfair. The scenarios are in `faults.py`; those of single functions in tests/unit.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.engine import warm
from tests.engine.faults import BEYOND, SCENARIOS
from tests.engine.stress import POOL

Facts = dict[str, Any]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Facts]:
    """Report of `tests.engine.faults`; after a scenario that failed a new process."""
    target = tmp_path_factory.mktemp("faults") / "report.json"
    done: dict[str, Facts] = {}
    while missing := [name for name in SCENARIOS if name not in done]:
        target.unlink(missing_ok=True)
        log = warm.run(
            "tests.engine.faults",
            target,
            *missing,
            log=target.with_suffix(".log"),
            timeout=1200,
        )
        new = json.loads(target.read_text()) if target.exists() else {}
        if not new:
            new = {missing[0]: {"traceback": log}}
        done |= new
    return done


def of(report: dict[str, Facts], name: str) -> Facts:
    """What came of a scenario."""
    found = report[name]
    assert "traceback" not in found, found["traceback"]
    return found


def check_served(found: Facts, tokens: dict[str, int]) -> None:
    """These requests got exactly their tokens."""
    assert {rid: found[rid]["tokens"] for rid in tokens} == tokens
    assert all(found[rid]["type"] == "length" for rid in tokens)


def check_refused(answer: Facts, *parts: str, status: int = 400) -> None:
    """Ended with a short error that says this."""
    assert (answer["type"], answer["status"]) == ("abort", status)
    assert len(answer["message"]) < 400
    for part in parts:
        assert part in answer["message"]


def test_a1_a_budget_beyond_int64_is_refused_alone(report: dict[str, Facts]) -> None:
    found = of(report, "budget_beyond_int64")
    check_served(found, {"good": 4})
    for rid in found.keys() - {"good"}:
        check_refused(found[rid], "budget")


def test_a2_urgent_prompts_of_one_round_fit_together(report: dict[str, Facts]) -> None:
    found = of(report, "urgent_prompts_in_one_round")
    check_served(found, {f"slow{i}": 300 for i in range(3)})
    check_served(found, {f"urgent{i}": 8 for i in range(2)})
    assert sum(answer["retractions"] for answer in found.values()) >= 1


def test_a2_who_is_preempted_is_never_lost(report: dict[str, Facts]) -> None:
    found = of(report, "preempted_for_a_prompt_that_is_not_admitted")
    check_served(found, {f"slow{i}": 100 for i in range(4)})
    check_served(found, {f"urgent{i}": 8 for i in range(2)})


def test_b1_every_length_is_served_or_refused(report: dict[str, Facts]) -> None:
    """Around the longest prompt that two copies and a chunk leave room for."""
    found = of(report, "lengths_around_the_peak")
    served = {rid for rid, answer in found.items() if answer["type"] == "length"}
    assert all(found[rid]["tokens"] == 3 for rid in served)
    assert len(served) > 20
    refused = found.keys() - served
    assert len(refused) > 5
    for rid in refused:
        rate, length = map(int, rid.split("x"))
        # Two copies and the shortest chunk that is worth a pass, a page and slack, and
        # a page of queries.
        copy = -(-length // rate // 16) * 16
        assert 2 * copy + 128 + 64 + 16 + 16 >= POOL
        check_refused(found[rid], str(length), str(POOL), "higher rate")


def test_b2_chunks_behind_the_own_prefix(report: dict[str, Facts]) -> None:
    found = of(report, "behind_its_own_prefix")
    check_served(found, {rid: 40 for rid in found if rid.startswith("long")})
    check_served(found, {rid: 3 for rid in found if rid.startswith("whole")})
    # The hit is used as far as there is room beside it.
    hits = [found[rid]["cached"] for rid in found if rid.startswith("long")]
    assert len(hits) == 4
    assert min(hits) > 500


def test_b3_what_fits_only_uncompressed_is_served_so(report: dict[str, Facts]) -> None:
    found = of(report, "neither_whole_nor_in_chunks")
    check_served(found, {"prefix": 3, "rate1.5": 40})
    others = found.keys() - {"prefix", "rate1.5"}
    assert len(others) == 8
    check_served(found, dict.fromkeys(others, 20))
    assert found["rate1.5"]["cached"] == 960


def test_b4_what_has_outgrown_the_pool_comes_back(report: dict[str, Facts]) -> None:
    found = of(report, "outgrown_and_retracted")
    check_served(found, {"long": BEYOND, "short": 900})
    assert found["long"]["retractions"] == 1


def test_b4_or_ends_with_an_error_of_its_own(report: dict[str, Facts]) -> None:
    found = of(report, "outgrown_and_retracted_without_chunks")
    check_served(found, {"short": 900})
    answer = found["long"]
    check_refused(answer, "interrupted", str(answer["tokens"]), str(POOL), status=503)
    # What was generated until then has reached the client.
    assert 100 + answer["tokens"] > POOL


def test_c1_a_short_prompt_may_write_more_than_the_pool(
    report: dict[str, Facts],
) -> None:
    found = of(report, "outputs_longer_than_the_pool")
    check_served(found, {"budget": BEYOND, "rate": BEYOND})
    # SGLang's own limit where nothing is evicted.
    assert found["whole"]["tokens"] == POOL - 32 - 17
    # With rate 2 until no copy fits, and then to the end of the pool.
    assert 1104 < 500 + found["near"]["tokens"] < 1500 + 500


def test_c3_a_hopeless_pass_leaves_the_cache_of_others(
    report: dict[str, Facts],
) -> None:
    found = of(report, "a_pass_that_cannot_help")
    check_served(found, {"other": 1, "large": 60, "again": 1})
    assert found["large"]["kv"]["deferred_passes"] == 0
    assert found["again"]["cached"] == 320


def test_c5_an_abort_between_chunks_leaves_nothing_pending(
    report: dict[str, Facts],
) -> None:
    found = of(report, "aborted_between_two_chunks")
    check_served(found, {"runs": 60})
    pending = found["pending"]
    assert max(pending) > 500
    # The prompt was aborted in the middle, and others went on for some time.
    assert pending[11:] == [0] * (len(pending) - 11)
    assert len(pending) > 40


def test_c6_our_message_survives_a_logprob_start(report: dict[str, Facts]) -> None:
    found = of(report, "refused_with_logprobs")
    check_refused(found["long"], "2000 tokens", "not compressed")
    check_refused(found["bad"], "rate")
    check_served(found, {"good": 4})


def test_a_running_request_survives_a_prompt_that_waits(
    report: dict[str, Facts],
) -> None:
    """SGLang ends the last running request of a full pool; it can come back."""
    found = of(report, "full_pool_beside_a_started_prompt")
    check_served(found, {"runs": 150, "long": 8})


def test_c8_no_name_of_the_stress_test_begins_with_another() -> None:
    """SGLang aborts by prefix."""
    import random

    from tests.engine.stress import REQUESTS_PER_LOAD, mixed_requests

    requests = mixed_requests(random.Random(0), REQUESTS_PER_LOAD, aborts=True)
    names = sorted(request.rid for request in requests)
    assert not any(b.startswith(a) for a, b in zip(names, names[1:], strict=False))
