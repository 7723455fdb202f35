"""Nothing evicted: the same tokens as stock SGLang."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from tests.engine import warm
from tests.engine.inprocess import InProcessScheduler, Output, Request
from tests.engine.stock import diverging_ids
from tests.engine.texts import prompt

LENGTHS = (
    20, 31, 47, 63, 64, 65, 100, 127, 150, 200, 255, 256, 257, 300, 333, 400,
    420, 511, 513, 520, 600, 769, 1500, 3000,
)  # fmt: skip
NEW_TOKENS = 16
MAX_DIVERGING = 2


def identity_requests(model_path: str) -> list[Request]:
    """24 prompts; every third shares a 160-token prefix with the one before it."""
    requests = []
    for i, length in enumerate(LENGTHS):
        ids = prompt(model_path, 500 * i, length)
        if i % 3 == 2 and length > 180:
            ids = prompt(model_path, 500 * (i - 1), 160) + ids[160:]
        # Half ask for rate 1, half for a budget that is never reached.
        kv: dict[str, Any] = {"rate": 1} if i % 2 else {"budget": 100_000}
        requests.append(
            Request(f"r{i}", ids, NEW_TOKENS, kv=kv, arrive=3 * i, top_logprobs=2)
        )
    return requests


@pytest.fixture(scope="module")
def stock_outputs(
    model_path: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Outputs of stock SGLang for `identity_requests`."""
    folder = tmp_path_factory.mktemp("stock")
    source, target = folder / "requests.json", folder / "outputs.json"
    requests = identity_requests(model_path)
    source.write_text(json.dumps([dataclasses.asdict(r) for r in requests]))
    words = (model_path, source, target)
    log = warm.run("tests.engine.stock", *words, log=folder / "log.txt")
    assert target.exists(), log
    return json.loads(target.read_text())


def test_rate_one_equals_stock_token_for_token(
    fresh: InProcessScheduler, model_path: str, stock_outputs: dict[str, Any]
) -> None:
    """24 prompts of 20 to 3,000 tokens, chunk 256, prefix hits, overlap on."""
    requests = identity_requests(model_path)
    outputs = fresh.serve([dataclasses.replace(r, top_logprobs=0) for r in requests])
    assert any(out.cached_tokens for out in outputs.values())
    for output in outputs.values():
        assert len(output.ids) == NEW_TOKENS
        assert output.kv[-1]["passes"] == 0
    stock = {
        rid: Output(told["ids"], top_logprobs=told["top"])
        for rid, told in stock_outputs.items()
    }
    diverging = diverging_ids(outputs, stock)
    assert len(diverging) <= MAX_DIVERGING, diverging
