"""Every architecture of the guide's table "Models", as a tiny random model."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.engine.inprocess import Request
from tests.engine.kept import FLAGS, check_kept, tokens, traced
from tests.engine.ranks import Job, Load, Served, serve_jobs
from tests.engine.stock import diverging_ids, without_options
from tests.engine.tiny_models import MODELS

pytestmark = pytest.mark.server

SERVER: dict[str, Any] = {
    "tp_size": 1,
    "chunked_prefill_size": 128,
    "max_total_tokens": 4096,
}
TRACED = (331, 64)
LENGTHS = (20, 47, 64, 100, 200, 257, 400, 600)
NEW = 12
MIXED = 15
ABORTED = (7, 11)
UNCOMPRESSED = {"enabled": False}
ABORT = {"type": "abort"}


def same_prompts() -> list[Request]:
    """Prompts of which nothing is evicted, whichever way that is said."""
    rng = random.Random(3)
    return [
        Request(
            f"s{i}",
            tokens(rng, length),
            NEW,
            kv={"rate": 1} if i % 2 else {"budget": 100_000},
            arrive=2 * i,
            top_logprobs=2,
        )
        for i, length in enumerate(LENGTHS)
    ]


def mixed() -> list[Request]:
    """Every kind of option, shared prefixes and aborts."""
    rng = random.Random(4)
    shared = tokens(rng, 120)
    options = (None, {"rate": 2}, {"rate": 8}, {"budget": 64}, UNCOMPRESSED)
    requests = []
    for i in range(MIXED):
        length, arrive = (150, 300, 420)[i % 3], 3 * i
        ids = tokens(rng, length)
        if i % 4 == 2:
            ids[:120] = shared
        abort_at = arrive + 12 if i in ABORTED else None
        kv = options[i % len(options)]
        requests.append(Request(f"m{i:02}", ids, 40, kv, arrive, abort_at))
    return requests


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By architecture: its path, what stock SGLang made of it, and what we."""
    folder = tmp_path_factory.mktemp("models")
    paths = [model.write(folder / name) for name, model in MODELS.items()]
    jobs = []
    for path in paths:
        server = {**SERVER, "model": path}
        jobs += [
            Job(server, [Load(without_options(same_prompts()))], compress=False),
            Job(
                {**server, **FLAGS},
                [Load(same_prompts()), Load(mixed()), traced(*TRACED)],
            ),
        ]
    results = serve_jobs(folder, jobs)
    rows = zip(paths, results[::2], results[1::2], strict=True)
    return dict(zip(MODELS, rows, strict=True))


def loads(served: dict[str, Any], name: str) -> list[Served]:
    """Of one architecture: stock's load, then ours."""
    _, *results = served[name]
    return [load for result in results for load in result.by_rank()[0]]


@pytest.mark.parametrize("name", MODELS)
def test_rate_one_equals_stock_token_for_token(
    served: dict[str, Any], name: str
) -> None:
    stock, ours, *_ = loads(served, name)
    assert all(out.kv[-1]["passes"] == 0 for out in ours.outputs.values())
    diverging = diverging_ids(ours.outputs, stock.outputs)
    assert len(diverging) <= 1, diverging
    # Answers that say nothing would agree as well.
    assert len({i for out in stock.outputs.values() for i in out.ids}) > 2 * NEW


@pytest.mark.parametrize("name", MODELS)
def test_compressed_and_no_page_lost(served: dict[str, Any], name: str) -> None:
    """SGLang's idle check has run as well."""
    _, same, load, _ = loads(served, name)
    assert same.whole
    assert load.whole
    for i, request in enumerate(mixed()):
        out = load.outputs[request.rid]
        assert ((out.finish or ABORT)["type"] == "abort") == (i in ABORTED)
        if i not in ABORTED:
            assert len(out.ids) == request.max_new
            passes = out.kv[-1]["passes"] if out.kv else 0
            assert (passes == 0) if request.kv == UNCOMPRESSED else (passes >= 2)
    assert any(out.cached_tokens for out in load.outputs.values())


@pytest.mark.parametrize("name", MODELS)
def test_keeps_what_the_oracle_keeps(served: dict[str, Any], name: str) -> None:
    """Scores take the model's softmax scale."""
    *_, traced_load = loads(served, name)
    check_kept(served[name][0], [traced_load], *TRACED, 1)
