"""Tensor parallelism: several ranks serve one model and keep in step."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.engine.inprocess import Request
from tests.engine.kept import FLAGS, check_kept, tokens, traced
from tests.engine.ranks import Job, Load, Result, serve_jobs
from tests.engine.server import free_port
from tests.engine.stock import diverging_ids, without_options
from tests.engine.stress import mixed_requests
from tests.engine.tiny_model import HEADS, write_tiny_model

pytestmark = pytest.mark.server

POOL = 2048
CASES = ((500, 128), (900, 192), (331, 64))
LENGTHS = (
    *(20, 31, 47, 63, 64, 65, 100, 127, 150, 200, 255, 256),
    *(257, 300, 333, 400, 420, 511, 513, 520, 600, 769, 1100, 1500),
)
MIXED = 28
CONVERSATIONS = 24
"""More than the pool holds, so that host memory gets some."""


def same_prompts() -> list[Request]:
    """24 prompts of which nothing is evicted; a third shares a prefix with another."""
    rng = random.Random(5)
    shared = tokens(rng, 160)
    requests = []
    for i, length in enumerate(LENGTHS):
        ids = tokens(rng, length)
        if i % 3 == 2 and length > 180:
            ids[:160] = shared
        kv: dict[str, Any] = {"rate": 1} if i % 2 else {"budget": 100_000}
        requests.append(Request(f"s{i:03}", ids, 12, kv=kv, arrive=3 * i))
    return requests


def mixed(seed: int, **switches: Any) -> Load:
    """Every kind of option, aborts, prompts longer than the pool, retractions."""
    requests = mixed_requests(random.Random(seed), MIXED, aborts=True, longs=True)
    return Load(requests, retract_every=9, **switches)


def conversations(count: int) -> Load:
    """Three turns each, so far apart that one has ended when the next arrives.

    The model's answers are left out of the texts, which are known beforehand so.
    """
    rng = random.Random(8)
    requests = []
    for i in range(count):
        ids = tokens(rng, rng.randrange(200, 400))
        for turn in range(3):
            arrive = 150 * turn + 6 * i
            rid = f"c{turn}{i:02}"
            requests.append(Request(rid, ids, 4, kv={"rate": 4}, arrive=arrive))
            ids = ids + tokens(rng, rng.randrange(20, 80))
    return Load(requests, retract_every=40)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def results(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Two ranks, stock ones, four on two nodes, and two that disagree."""
    stock = {"model": model, "tp_size": 2, "max_total_tokens": POOL}
    two = {**stock, **FLAGS}
    # On one machine. The ranks of a node are told so, and the groups span both.
    nodes = {"nnodes": 2, "dist_init_addr": f"127.0.0.1:{free_port()}"}
    jobs = {
        "two": Job(
            two,
            [
                *(traced(*case) for case in CASES),
                Load(same_prompts()),
                mixed(0),
                mixed(1, overlap=False, radix=False),
            ],
        ),
        "stock": Job(stock, [Load(without_options(same_prompts()))], compress=False),
        "four": Job({**two, "tp_size": 4, **nodes}, [traced(*CASES[0]), mixed(8)]),
        # Between chunks, so that the prefix cache has little of the prompts.
        "sessions": Job(
            {
                **{**two, "kv_compress_sessions": True, "kv_compress_chunks": "always"},
                "kv_compress_sessions_host": 1.0,
            },
            [conversations(CONVERSATIONS), mixed(3)],
        ),
        "late": Job(two, [traced(*CASES[0])], mutant="late pass"),
    }
    served = serve_jobs(tmp_path_factory.mktemp("ranks"), list(jobs.values()))
    return dict(zip(jobs, served, strict=True))


@pytest.mark.parametrize("number", range(len(CASES)))
def test_each_rank_keeps_what_the_oracle_keeps(
    model: str, results: dict[str, Result], number: int
) -> None:
    served = [loads[number] for loads in results["two"].by_rank()]
    check_kept(model, served, *CASES[number], 2)


def test_copies_of_a_head_are_scored_by_the_queries_of_their_rank(
    model: str, results: dict[str, Result]
) -> None:
    served = [loads[0] for loads in results["four"].by_rank()]
    assert len(served) == 2 * HEADS
    check_kept(model, served, *CASES[0], 4)


def test_rate_one_equals_stock_token_for_token(results: dict[str, Result]) -> None:
    """24 prompts of 20 to 1,500 tokens, with prefix hits, on two ranks each."""
    stock = results["stock"].by_rank()[0][0].outputs
    ours = results["two"].by_rank()[0][len(CASES)].outputs
    assert any(out.cached_tokens for out in ours.values())
    assert all(out.kv[-1]["passes"] == 0 for out in ours.values())
    diverging = diverging_ids(ours, stock)
    assert len(diverging) <= 2, diverging


@pytest.mark.parametrize(
    ("name", "mixed_loads"), [("two", 2), ("four", 1), ("sessions", 1)]
)
def test_ranks_decide_alike_and_lose_no_page(
    results: dict[str, Result], name: str, mixed_loads: int
) -> None:
    """Retractions, aborts, flushes; SGLang's idle check is on in every rank."""
    ranks = results[name].by_rank()
    for first, *others in zip(*ranks, strict=True):
        assert first.checked > 0
        assert first.whole
        for other in others:
            assert (other.checked, other.whole) == (first.checked, True)
            # What a client gets; SGLang sends that of the first rank.
            assert other.outputs == first.outputs
    loads = ranks[0][-mixed_loads:]
    outputs = [out for load in loads for out in load.outputs.values()]
    assert len(outputs) == MIXED * mixed_loads
    assert sum(out.retractions for out in outputs) > 0
    assert sum(out.kv[-1]["passes"] for out in outputs if out.kv) > MIXED // 2
    aborted = [out for out in outputs if (out.finish or {}).get("type") == "abort"]
    assert 0 < len(aborted) < MIXED


def test_ranks_resume_the_same_snapshots(results: dict[str, Result]) -> None:
    """Under retractions; each rank packs its own heads, and finds the same texts."""
    one, other = (loads[0] for loads in results["sessions"].by_rank())
    assert one.outputs == other.outputs
    assert (one.whole, other.whole) == (True, True)
    assert one.brought_back == other.brought_back > 0
    told = [out.kv[-1] for out in one.outputs.values()]
    assert sum(kv["resumed_tokens"] > 0 for kv in told) > CONVERSATIONS


def test_ranks_that_decide_otherwise_are_told(results: dict[str, Result]) -> None:
    """One rank puts a pass off; without the check it would wait for ever."""
    assert "plan different steps: here 1 requests" in results["late"].error
