"""A turn that starts from a snapshot goes on as if its request had never ended."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest

from sglang_kvc.config.pages import floor_tokens
from tests.engine.conversations import Turn, keeping_sessions, serve_turn
from tests.engine.inprocess import InProcessScheduler, Request
from tests.engine.oracle import TIE, Oracle, Step, check_few_differ
from tests.engine.texts import prompt
from tests.engine.tracer import PassTracer

TURNS = 4
CONVERSATIONS = int(os.environ.get("KVC_SESSIONS", "4"))
"""Set it for more of them; 12 ran once."""
FORKED = CONVERSATIONS // 4
"""Conversations that part in two behind their second turn."""
BUDGET = 96

Line = list[Turn]
"""One conversation from its first turn on; forks have the first turns in common."""


def first_turns(model_path: str, rng: random.Random) -> list[list[int]]:
    return [
        prompt(model_path, 900 * i, rng.randrange(140, 320))
        for i in range(CONVERSATIONS)
    ]


def converse(server: InProcessScheduler, model_path: str, delay: int) -> list[Line]:
    """Serve all turns of all conversations, a turn at a time."""
    rng = random.Random(4)
    lines: list[Line] = [[] for _ in range(CONVERSATIONS)]
    prompts = first_turns(model_path, rng)
    runtime = server.allocator.get_kvcache().runtime
    with PassTracer(runtime) as tracer:
        for turn in range(TURNS):
            requests = [
                Request(f"{turn}-{i:03}", ids, 24, kv={"budget": BUDGET})
                for i, ids in enumerate(prompts)
            ]
            served = serve_turn(server, tracer, requests)
            lines = [
                [*line, served[request.rid]]
                for line, request in zip(lines, requests, strict=True)
            ]
            if turn == 1:
                lines = lines + [list(line) for line in lines[:FORKED]]
            # Of a short second turn the prefix cache has as much, and lossless.
            least = 3 if turn else 24 + delay
            prompts = [
                line[-1].ids
                + line[-1].out.ids
                + prompt(model_path, 20_000 + 37 * i, rng.randrange(least, 70))
                for i, line in enumerate(lines)
            ]
    return lines


@pytest.fixture(scope="module", params=[0, 7], ids="delay{}".format)
def delay(request: pytest.FixtureRequest) -> int:
    """Tokens that first passes wait for: those of first turns only.

    So few that the snapshot reaches a page further than the whole copy would.
    """
    waits: int = request.param
    return waits


@pytest.fixture(scope="module")
def lines(scheduler: InProcessScheduler, model_path: str, delay: int) -> list[Line]:
    """All conversations, served once, with the prefix cache's copies out of the way."""
    scheduler.set_overlap(True)
    scheduler.set_radix(True)
    with keeping_sessions(scheduler, delay=delay) as store:
        served = converse(scheduler, model_path, delay)
        assert store.hits == sum(len(line) - 1 for line in served) - FORKED
        return served


def test_every_later_turn_computes_what_is_new(lines: list[Line]) -> None:
    """The rest of the answer's last page and what the user says; the client is told."""
    for line in lines:
        for before, turn in zip(line, line[1:], strict=False):
            held = len(before.ids) + len(before.out.ids) - 1
            # Overlap has run the last token, too, though nobody asked for the next.
            assert held - 16 < turn.out.cached_tokens <= held + 1
            kv = turn.out.kv[-1]
            assert kv["resumed_tokens"] == turn.out.cached_tokens
            assert kv["generations"] >= line.index(turn)
            assert kv["passes"] > 0
        assert line[0].out.kv[-1]["resumed_tokens"] == 0
        assert line[0].out.kv[-1]["generations"] == 0


def test_kept_sets_and_tokens_are_those_of_the_oracle(
    lines: list[Line], scheduler: InProcessScheduler, model_path: str, delay: int
) -> None:
    """In every layer and head, behind every pass of every turn, and every token."""
    options = scheduler.allocator.get_kvcache().runtime.options
    oracle = Oracle(model_path, options)
    differing = total = tokens = missed = 0
    for line in lines:
        request = oracle.request(line[0].ids)
        for turn, after in zip(line, [*line[1:], None], strict=True):
            if turn is not line[0]:
                request.resume(turn.ids, turn.out.cached_tokens)
            level, late = turn is line[0], turn.lengths[0] - len(turn.ids)
            # With less than a page that is new there is none behind the prompt.
            assert late == delay if level else 0 <= late < 16
            settled = settled_passes(turn, after)
            steps = [
                Step(at, level=level, first=level and not i)
                for i, at in enumerate(turn.lengths[:settled])
            ]
            kept = turn.kept[:settled]
            differing += request.replay(turn.out.ids, steps, kept, BUDGET, TIE)
            total += len(steps) * BUDGET * oracle.layers * oracle.heads
            text = turn.ids + turn.out.ids
            # The last token too: with overlap it was run, and may be in the snapshot.
            request.extend_to(text, len(text))
            places = range(len(turn.ids), len(text))
            tokens += len(places)
            missed += sum(request.predicted[at] != text[at] for at in places)
    check_few_differ(differing, total)
    assert tokens == 24 * sum(map(len, lines))
    assert missed == 0


def settled_passes(turn: Turn, after: Turn | None) -> int:
    """Passes of a turn that are in what it left.

    One that was launched together with the result that ended the request is not. It has
    changed no token.
    """
    if after is None:
        return len(turn.lengths)
    generations = (it.out.kv[-1]["generations"] for it in (after, turn))
    made = next(generations) - next(generations)
    assert 0 <= len(turn.lengths) - made <= 1
    return made


def test_forks_part_from_the_same_snapshot(lines: list[Line]) -> None:
    """Both start from it, at the same time, and go their own ways."""
    for i in range(FORKED):
        one, other = lines[i], lines[CONVERSATIONS + i]
        assert one[:2] == other[:2]
        assert one[2].out.cached_tokens == other[2].out.cached_tokens
        assert one[2].out.cached_tokens >= floor_tokens(len(one[1].ids))
        assert one[3].ids != other[3].ids


def resumed(
    server: InProcessScheduler,
    ids: list[int],
    first: dict[str, Any],
    then: dict[str, Any],
    **who: Any,
) -> int:
    """Tokens that a second turn starts from, after a first one with other options.

    `who` sends the second. The prefix cache's copy is gone by then.
    """
    out = server.serve([Request("one", ids, 20, kv=first)])["one"]
    tree = server.sch.tree_cache
    tree.drop_spares(1 << 20)
    more = ids + out.ids + ids[:50]
    after = server.serve([Request("two", more, 2, kv=then, **who)])["two"]
    assert after.finish is not None
    assert after.finish["type"] == "length", after.finish
    tokens: int = after.kv[-1]["resumed_tokens"]
    assert tokens in (0, after.cached_tokens)
    server.flush()
    return tokens


def test_who_starts_from_a_snapshot(fresh: InProcessScheduler, model_path: str) -> None:
    """Whoever would have kept no more of the text, and belongs to the same tenant."""
    ids = prompt(model_path, 7_000, 500)
    four, eight = {"rate": 4}, {"rate": 8}
    with keeping_sessions(fresh):
        assert resumed(fresh, ids, four, four) == 512
        assert resumed(fresh, ids, four, eight) == 512
        assert resumed(fresh, ids, eight, four) == 0
        assert resumed(fresh, ids, {"budget": 128}, {"budget": 128}) == 512
        assert resumed(fresh, ids, four, four, tenant="another") == 0
        assert resumed(fresh, ids, four, four, extra_key="another") == 0
        assert resumed(fresh, ids, four, {**four, "resume": False}) == 0
        assert resumed(fresh, ids, four, {"report_tokens": True}) == 0
        assert resumed(fresh, ids, four, {"enabled": False}) == 0
        assert resumed(fresh, ids, {"keep": "whole"}, four) == 0
        assert resumed(fresh, ids, {"keep": "none"}, four) == 0
        assert resumed(fresh, ids, {"enabled": False}, four) == 0


def test_what_is_left_behind(fresh: InProcessScheduler, model_path: str) -> None:
    """A packed copy and the prompt's whole one, the latter alone, or nothing."""
    ids = prompt(model_path, 8_000, 250)
    tree = fresh.sch.tree_cache

    def left(**kv: Any) -> tuple[int, int]:
        """Snapshots, and tokens of whole copies; or an abort."""
        abort = kv.pop("abort", None)
        fresh.serve([Request("x", ids, 40, kv={"budget": 64, **kv}, abort_at=abort)])
        found = len(tree.sessions)
        tokens = tree.evictable_size() - tree.sessions.tokens
        fresh.flush()
        return found, tokens

    with keeping_sessions(fresh):
        assert left() == (1, 240)
        assert left(keep="compressed") == (1, 240)
        assert left(keep="whole") == (0, 240)
        assert left(keep="none") == (0, 0)
        assert left(abort=25)[0] == 0


def test_an_exact_copy_wins(fresh: InProcessScheduler, model_path: str) -> None:
    """If it is as long as the snapshot, or as long as any that may be started from."""
    ids = prompt(model_path, 9_000, 400)
    with keeping_sessions(fresh) as store:
        out = fresh.serve([Request("one", ids, 20, kv={"budget": 64})])["one"]
        again = fresh.serve([Request("two", ids, 2, kv={"budget": 64})])["two"]
        assert (again.cached_tokens, again.kv[-1]["resumed_tokens"]) == (368, 0)
        longer = ids + out.ids + ids[:60]
        after = fresh.serve([Request("three", longer, 2, kv={"budget": 64})])["three"]
        assert after.kv[-1]["resumed_tokens"] == after.cached_tokens == 416
        assert store.hits == 1


def test_sessions_off_nothing_is_kept_or_reported(
    fresh: InProcessScheduler, model_path: str
) -> None:
    """And who asks for them is told; see `test_request_options` for all that is."""
    ids = prompt(model_path, 10_000, 300)
    out = fresh.serve([Request("one", ids, 20, kv={"budget": 64})])["one"]
    assert "resumed_tokens" not in out.kv[-1]
    assert fresh.sch.tree_cache.sessions is None
    refused = fresh.serve([Request("two", ids, 2, kv={"keep": "whole"})])["two"]
    assert refused.finish is not None
    assert refused.finish["status_code"] == 400
    assert "--kv-compress-sessions" in refused.finish["message"]


def test_a_richer_snapshot_is_not_shrunk(
    fresh: InProcessScheduler, model_path: str
) -> None:
    """Layers hold unequal parts of it, and could not all lose as much."""
    ids = prompt(model_path, 11_000, 500)
    with keeping_sessions(fresh):
        out = fresh.serve([Request("one", ids, 20, kv={"rate": 2})])["one"]
        held = out.kv[-1]["budget_tokens"]
        more = ids + out.ids + ids[:50]
        after = fresh.serve([Request("two", more, 40, kv={"rate": 8})])["two"]
        kv = after.kv[-1]
        assert kv["resumed_tokens"] > 500
        assert kv["passes"] >= 2
        assert kv["budget_tokens"] == held
