"""More conversations at once than a pool holds, each going on when it is answered.

All of them wait for their turn in one queue, so what was used longest ago belongs to
who is served next: an order of eviction by age alone finds nothing again.

``python -m tests.engine.crowd OUT.jsonl --sessions 60 --turns 6 --think 100`` serves
some in a pool of 4,096 tokens, for ``--seeds`` random numbers, and appends a record of
each: what was found and computed, and the steps that it took. Pages are audited.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
from collections import Counter
from pathlib import Path
from typing import Any

from bench.common.record import environment, write_record
from tests.engine.inprocess import Feed, InProcessScheduler, Request
from tests.engine.tiny_model import VOCAB

POOL = 4096
TURNS = 4
THINK = 20.0
"""Mean polls before a turn."""
ABORTS = 0.02


class Crowd:
    """Sessions that go on by themselves while a scheduler serves them.

    Parameters
    ----------
    server : InProcessScheduler
    sessions : int
    first, user, answer : int
        Tokens of the first prompt, and of what user and model say in each turn.
    turns : int
    think : float
        Mean polls before a turn.
    seed : int

    Attributes
    ----------
    counts : Counter
        ``requests``, ``resumed`` (later turns that start from a snapshot), ``later``,
        ``aborted``, ``lent`` (polls with loans), ``new`` and ``computed`` (tokens).
    """

    def __init__(
        self,
        server: InProcessScheduler,
        sessions: int,
        *,
        first: int = 240,
        user: int = 24,
        answer: int = 16,
        turns: int = TURNS,
        think: float = THINK,
        seed: int = 0,
    ) -> None:
        self.server, self.sessions = server, sessions
        self.first, self.user, self.answer = first, user, answer
        self.turns, self.think = turns, think
        self.counts: Counter[str] = Counter()
        self._rng = random.Random(f"crowd {seed}")
        self._open: dict[str, Request] = {}
        self._said: dict[str, list[int]] = {}
        self._seen = 0

    def serve(self) -> None:
        """Serve all turns; raises if one is not answered whole."""
        requests = [self._turn(f"{it}", 0, [], 0) for it in range(self.sessions)]
        before, self.server.on_poll = self.server.on_poll, self._look
        self._audit = before
        try:
            self.server.serve(requests)
        finally:
            self.server.on_poll = before
        # Who is aborted while nothing is to be told of it, is told nothing here.
        lost = [it.rid for it in self._open.values() if it.abort_at is None]
        assert not lost, lost
        self.counts["aborted"] += len(self._open)

    def _turn(self, session: str, turn: int, history: list[int], now: int) -> Request:
        new = self.user if turn else self.first
        ids = history + self._rng.choices(range(2, VOCAB), k=new)
        arrive = now + 1 + int(self._rng.expovariate(1 / self.think))
        request = Request(f"{session}.{turn}", ids, max_new=self.answer, arrive=arrive)
        if self._rng.random() < ABORTS:
            abort_at = arrive + self._rng.randrange(40)
            request = dataclasses.replace(request, abort_at=abort_at)
        self._open[request.rid], self._said[request.rid] = request, []
        self.counts["new"] += new
        return request

    def _look(self, now: int) -> None:
        if self._audit is not None:
            self._audit(now)
        self.counts["lent"] += len(self.server.sch.tree_cache.awaiting) > 0
        sent = self.server._sent
        for message in sent[self._seen :]:
            for place, rid in enumerate(getattr(message, "rids", None) or []):
                if message.output_ids is not None:
                    self._said[rid] += message.output_ids[place]
                if message.finished_reasons[place]:
                    self._ended(rid, message, place, now)
            # What waits when it is aborted is told so by itself.
            if getattr(message, "finished_reason", None) and message.rid in self._open:
                self.counts["aborted"] += 1
                del self._open[message.rid]
        self._seen = len(sent)

    def _ended(self, rid: str, message: Any, place: int, now: int) -> None:
        from sglang.srt.managers.io_struct import unwrap_from_pickle

        request, said = self._open.pop(rid), self._said.pop(rid)
        session, turn = rid.split(".")
        self.counts["requests"] += 1
        self.counts["computed"] += len(request.ids) - message.cached_tokens[place]
        info = unwrap_from_pickle(message.customized_info) or {}
        told = [it for it in info.get("kv_compress", [[]])[place] if it is not None]
        if int(turn):
            self.counts["later"] += 1
            self.counts["resumed"] += bool(told and told[-1]["resumed_tokens"])
        if message.finished_reasons[place]["type"] != "length":
            self.counts["aborted"] += 1
            assert request.abort_at is not None, message.finished_reasons[place]
            return
        assert len(said) == self.answer, (rid, len(said))
        if int(turn) + 1 < self.turns:
            feed: Feed = self.server.sch.request_receiver
            going_on = self._turn(session, int(turn) + 1, request.ids + said, now)
            feed.waiting.append(going_on)
            feed.requests.append(going_on)


def main() -> None:
    """Serve crowds; print and record what happened."""
    from tests.engine.audited import audited
    from tests.engine.fuzz import Setting, apply

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--sessions", type=int, default=60)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--think", type=float, default=THINK)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    options = {"kv_compress_interval": 16, "kv_compress_sessions": True}
    with audited(POOL, **options) as (server, _):
        apply(server, Setting(sessions=1))
        for seed in range(args.seeds):
            how = {"turns": args.turns, "think": args.think, "seed": seed}
            crowd, before = Crowd(server, args.sessions, **how), server.sch.forward_ct
            crowd.serve()
            steps = server.sch.forward_ct - before
            found = {"sessions": args.sessions, **how, **crowd.counts, "steps": steps}
            write_record(args.out, {**environment(), "pool": POOL, **found})
            print(found, flush=True)
            server.flush()


if __name__ == "__main__":
    main()
