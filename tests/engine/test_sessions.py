"""A turn that starts from a snapshot goes on as if its request had never ended."""

from __future__ import annotations

import random

import pytest

from sglang_kvc.config.pages import floor_tokens
from tests.engine.conversations import Turn, keeping_sessions, serve_turn
from tests.engine.inprocess import InProcessScheduler, Request
from tests.engine.oracle import TIE, Oracle, Step, check_few_differ
from tests.engine.texts import prompt
from tests.engine.tracer import PassTracer

TURNS = 4
CONVERSATIONS = 12
FORKED = 3
"""Conversations that part in two behind their second turn."""
BUDGET = 96

Line = list[Turn]
"""One conversation from its first turn on; forks have the first turns in common."""


def first_turns(model_path: str, rng: random.Random) -> list[list[int]]:
    return [
        prompt(model_path, 900 * i, rng.randrange(140, 320))
        for i in range(CONVERSATIONS)
    ]


def converse(server: InProcessScheduler, model_path: str) -> list[Line]:
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
            least = 3 if turn else 24
            prompts = [
                line[-1].ids
                + line[-1].out.ids
                + prompt(model_path, 20_000 + 37 * i, rng.randrange(least, 70))
                for i, line in enumerate(lines)
            ]
    return lines


@pytest.fixture(scope="module")
def lines(scheduler: InProcessScheduler, model_path: str) -> list[Line]:
    """All conversations, served once, with the prefix cache's copies out of the way."""
    scheduler.set_overlap(True)
    scheduler.set_radix(True)
    with keeping_sessions(scheduler) as store:
        served = converse(scheduler, model_path)
        assert store.hits == sum(len(line) - 1 for line in served) - FORKED
        return served


def test_every_later_turn_computes_what_is_new(lines: list[Line]) -> None:
    """The rest of the answer's last page and what the user says; the client is told."""
    for line in lines:
        for before, turn in zip(line, line[1:], strict=False):
            held = len(before.ids) + len(before.out.ids) - 1
            assert held - 16 < turn.out.cached_tokens <= held
            kv = turn.out.kv[-1]
            assert kv["resumed_tokens"] == turn.out.cached_tokens
            assert kv["generations"] >= line.index(turn)
            assert kv["passes"] > 0
        assert line[0].out.kv[-1]["resumed_tokens"] == 0
        assert line[0].out.kv[-1]["generations"] == 0


def test_kept_sets_and_tokens_are_those_of_the_oracle(
    lines: list[Line], scheduler: InProcessScheduler, model_path: str
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
            assert turn.lengths[0] == len(turn.ids)
            settled = settled_passes(turn, after)
            level = turn is line[0]
            steps = [Step(at, level=level) for at in turn.lengths[:settled]]
            kept = turn.kept[:settled]
            differing += request.replay(turn.out.ids, steps, kept, BUDGET, TIE)
            total += len(steps) * BUDGET * oracle.layers * oracle.heads
            text = turn.ids + turn.out.ids
            request.extend_to(text, len(text) - 1)
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
