"""Prompts stay in the tree, lossless, after their request was compressed."""

from __future__ import annotations

from tests.engine.inprocess import InProcessScheduler, Request
from tests.engine.texts import prompt

PREFIX = 2000


def test_hit_on_a_compressed_request_gives_the_output_of_a_fresh_server(
    fresh: InProcessScheduler, model_path: str
) -> None:
    """Two requests with a common prefix: it is reused and changes nothing."""
    common = prompt(model_path, 0, PREFIX)
    first = Request("first", common + prompt(model_path, 5000, 60), 18)
    second = Request("second", common + prompt(model_path, 7000, 90), 18)
    alone = fresh.serve([second])["second"]
    fresh.flush()
    assert fresh.serve([first])["first"].kv[-1]["passes"] == 2
    after = fresh.serve([second])["second"]
    assert alone.cached_tokens == 0
    assert after.cached_tokens >= PREFIX - 16
    assert after.kv[-1]["passes"] == 2
    assert after.ids == alone.ids


def test_whole_prompt_cached_is_compressed_alike(
    fresh: InProcessScheduler, model_path: str
) -> None:
    """A repeated prompt recomputes only its window and ends the same way."""
    ids = prompt(model_path, 300, 700)
    first = fresh.serve([Request("a", ids, 12)])["a"]
    again = fresh.serve([Request("b", ids, 12)])["b"]
    window = fresh.allocator.get_kvcache().runtime.options.window
    assert again.cached_tokens == (700 - window) // 16 * 16
    assert again.kv[-1]["passes"] == first.kv[-1]["passes"] > 0
    assert again.ids == first.ids


def test_concurrent_requests_share_a_prefix(
    fresh: InProcessScheduler, model_path: str
) -> None:
    """Shared pages are read, never annotated: neighbours do not change a request."""
    common = prompt(model_path, 0, 400)
    requests = [
        Request(f"r{i}", common + prompt(model_path, 600 * i, 80 + i), 36, arrive=4 * i)
        for i in range(3)
    ]
    together = fresh.serve(requests)
    for request in requests:
        fresh.flush()
        alone = fresh.serve([Request(request.rid, request.ids, 36)])[request.rid]
        assert together[request.rid].ids == alone.ids
