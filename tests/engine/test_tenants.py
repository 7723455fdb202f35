"""A tenant's prompts are nobody else's prefix, however they came into the tree."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterator
from typing import Any

import pytest
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_kvc.upstream.generation import UPSTREAM, Generation22
from tests.engine.inprocess import InProcessScheduler, Output, Request
from tests.engine.texts import prompt

LENGTH, TOKENS = 400, 18
"""More than a chunk; more than an interval."""
TENANTS = ("red", "blue", None)
"""The last one has sent no salt."""
SALT = "cache_salt" if isinstance(UPSTREAM, Generation22) else "extra_key"
"""Field of a key of the tree."""
NOBODY = "nobody"
"""A salt that no request has sent."""


def match_length(result: Any) -> int:
    """Tokens of a match."""
    if isinstance(UPSTREAM, Generation22):
        return int(result.device_prefix_len)
    return len(result.device_indices)


def finders(scheduler: InProcessScheduler, ids: list[int]) -> set[str | None]:
    """Whose tenants find a prompt, or a part of it, in the tree."""
    found = set()
    for tenant in (*TENANTS, NOBODY):
        key = RadixKey(array("q", ids), **{SALT: tenant})
        if match_length(
            scheduler.sch.tree_cache.match_prefix(MatchPrefixParams(key=key))
        ):
            found.add(tenant)
    return found


def own_hit(scheduler: InProcessScheduler) -> int:
    """Tokens of a prompt that its own tenant finds: all but the window, whole pages."""
    window = scheduler.allocator.get_kvcache().runtime.options.window
    return (LENGTH - window) // 16 * 16


@pytest.fixture(params=["auto", "always"])
def both_ways(
    request: pytest.FixtureRequest, fresh: InProcessScheduler
) -> Iterator[InProcessScheduler]:
    """Prompts compressed whole, and between their chunks."""
    runtime = fresh.allocator.get_kvcache().runtime
    rule = runtime.chunk_rule
    runtime.chunk_rule = dataclasses.replace(rule, mode=request.param)
    yield fresh
    runtime.chunk_rule = rule


def ask(server: InProcessScheduler, ids: list[int], tenant: str | None) -> Output:
    """A compressed request."""
    out = server.serve([Request("x", ids, TOKENS, tenant=tenant)])["x"]
    assert out.kv[-1]["passes"] > 1
    return out


@pytest.mark.parametrize("overlap", [True, False])
def test_a_compressed_prompt_is_found_by_its_tenant_alone(
    both_ways: InProcessScheduler, model_path: str, overlap: bool
) -> None:
    """Settled with the result without overlap, before the next step with it.

    A prompt that was compressed between its chunks has left its first chunk.
    """
    both_ways.set_overlap(overlap)
    ids = prompt(model_path, 0, LENGTH)
    runtime = both_ways.allocator.get_kvcache().runtime
    chunked = runtime.chunk_rule.mode == "always"
    seen: set[str | None] = set()
    for tenant in TENANTS:
        first, again = ask(both_ways, ids, tenant), ask(both_ways, ids, tenant)
        seen.add(tenant)
        assert finders(both_ways, ids) == seen
        assert first.cached_tokens == 0
        hit = runtime.chunk_rule.chunk_size if chunked else own_hit(both_ways)
        assert again.cached_tokens == hit
        if not chunked:
            assert again.ids == first.ids


def test_prompts_that_run_together_stay_apart(
    both_ways: InProcessScheduler, model_path: str
) -> None:
    """Two tenants and none, the same text at once; the answer is that of one alone."""
    ids = prompt(model_path, 0, LENGTH)
    requests = [Request(f"r{t}", ids, TOKENS, tenant=t) for t in TENANTS]
    together = both_ways.serve(requests)
    assert finders(both_ways, ids) == set(TENANTS)
    assert [out.cached_tokens for out in together.values()] == [0, 0, 0]
    both_ways.flush()
    alone = ask(both_ways, ids, "red")
    assert [out.ids for out in together.values()] == [alone.ids] * 3


def test_a_retracted_prompt_comes_back_to_its_own_prefix(
    both_ways: InProcessScheduler, model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every few steps somebody is retracted, and prefilled again from the tree."""
    from sglang.srt.managers import scheduler as stock

    monkeypatch.setattr(stock, "TEST_RETRACT", True)
    monkeypatch.setattr(stock, "TEST_RETRACT_INTERVAL", 5)
    hits: dict[str | None, list[int]] = {}
    tree = both_ways.sch.tree_cache
    real = tree.match_prefix

    def match(params: Any) -> Any:
        result = real(params)
        hits.setdefault(getattr(params.key, SALT), []).append(match_length(result))
        return result

    monkeypatch.setattr(tree, "match_prefix", match)
    ids = prompt(model_path, 0, LENGTH)
    requests = [
        Request(f"r{tenant}", ids, TOKENS, tenant=tenant, arrive=8 * i)
        for i, tenant in enumerate(TENANTS)
    ]
    outputs = both_ways.serve(requests)
    # Nobody has found what was there before; who came back has found its own.
    assert [hits[tenant][0] for tenant in TENANTS] == [0, 0, 0]
    assert any(map(any, hits.values()))
    assert sum(out.retractions for out in outputs.values()) > 2
    assert all(len(out.ids) == TOKENS for out in outputs.values())
    assert finders(both_ways, ids) == set(TENANTS)


def test_a_hit_is_shortened_for_its_tenant_alone(
    fresh: InProcessScheduler, model_path: str
) -> None:
    """A prompt without compression leaves all of itself; a hit leaves out a window."""
    ids = prompt(model_path, 0, LENGTH)
    fresh.serve([Request("x", ids, TOKENS, kv={"enabled": False}, tenant="red")])
    assert finders(fresh, ids) == {"red"}
    assert ask(fresh, ids, "blue").cached_tokens == 0
    assert ask(fresh, ids, "red").cached_tokens == own_hit(fresh)
    assert finders(fresh, ids) == {"red", "blue"}


@pytest.mark.skipif(
    not isinstance(UPSTREAM, Generation22), reason="a later release has both keys"
)
def test_a_salt_and_an_extra_key_are_two_keys(
    fresh: InProcessScheduler, model_path: str
) -> None:
    """Neither stands for the other, nor does what both spell together."""
    ids = prompt(model_path, 0, LENGTH)
    pairs = (("ab", "c"), ("a", "bc"), ("ab", None), (None, "ab"), (None, "abc"))
    for again in (False, True):
        for tenant, extra_key in pairs:
            request = Request("x", ids, TOKENS, tenant=tenant, extra_key=extra_key)
            out = fresh.serve([request])["x"]
            assert out.cached_tokens == (own_hit(fresh) if again else 0)
