"""Conversations of `bench.serving.conversations` in the time that a GPU would take.

The tiny model serves them with the real scheduler; a clock counts what each step would
take for an 8B model on an H200. So a rule of scheduling can be tried in minutes without
a GPU: with the rules of 8c38b41 nine of ten turns at rate 8 took 96 s here, 87 s there.

    python -m tests.engine.timed OUT.jsonl --rate 8

serves the bench's default load, prints what happens every five seconds, and appends a
record with the bench's figures. ``--sessions``, ``--think``, ``--pool`` and what else
describes a load are the bench's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common.record import environment, write_record
from bench.serving.conversations.args import parse_arguments
from bench.serving.conversations.drive import Turn
from bench.serving.conversations.figures import summarize
from bench.serving.conversations.load import Load
from sglang_kvc.sessions.host import Copy
from tests.engine.inprocess import (
    Feed,
    InProcessScheduler,
    Request,
    make_server_args,
)
from tests.engine.tiny_model import ONE_LAYER, VOCAB, write_tiny_model

DECODE_S, DECODE_REQUEST_S = 4.7e-3, 0.09e-3
"""A step of decoding, and of it each request's part: 1 and 60 requests at rate 8, as in
the log of a server (8c38b41, H200, 8B)."""
PREFILL_S, PREFILL_TOKENS_PER_S = 17e-3, 42_500
"""A prefill, and its tokens: those of 1,024 and of 8,192 there."""
COPY_TOKENS_PER_S = 380_000
"""To host memory or back: 128 KiB a token of an 8B model at 50 GB/s. (Assumed.)"""
CHUNK = 8192
LONGEST = 16384
FAR = 10**9
"""A poll that never comes."""
SHOWN_S = 5.0


class TimedLoad:
    """All sessions of a load, each going on when its user has thought.

    Parameters
    ----------
    server : InProcessScheduler
    load : Load
    say : called with a line of text every five seconds of the clock.

    Attributes
    ----------
    now : float
        Seconds by the clock.
    turns : list of Turn
        Those that were answered.
    """

    def __init__(self, server: InProcessScheduler, load: Load, say: Any = None) -> None:
        self.server, self.load, self.say = server, load, say
        self.now, self._shown, self._steps, self._seen = 0.0, 0.0, 0, 0
        self.turns: list[Turn] = []
        self._open: dict[str, Turn] = {}
        self._prompt: dict[str, list[int]] = {}
        self._said: dict[str, list[int]] = {}

    def serve(self) -> dict[str, Any]:
        """Serve all turns; the figures of `bench.serving.conversations`."""
        sessions = range(self.load.shape.sessions)
        first = [self._turn(it, 0, [], 1) for it in sessions]
        self._steps = self.server.sch.forward_ct
        self._count_copies()
        before, self.server.on_poll = self.server.on_poll, self._look
        try:
            self.server.serve(first)
        finally:
            self.server.on_poll = before
        return summarize(self.turns, self.load.shape.all_turns, 0.0)

    def _count_copies(self) -> None:
        """Let the clock go on by copies of snapshots to host memory and back."""
        host = self.server.allocator.get_kvcache().runtime.state.host
        if host is None:
            return
        copy_all = host.copy_all

        def timed(copies: Sequence[Copy]) -> None:
            self.now += sum(len(it.tokens) for it in copies) / COPY_TOKENS_PER_S
            copy_all(copies)

        host.copy_all = timed

    def _turn(
        self, session: int, branch: int, history: list[int], number: int
    ) -> Request:
        """A turn that is sent when its user has thought."""
        rid = f"{session}.{branch}.{number}"
        said = self.load.said(session, branch, number)
        begin = self.now + self.load.thought(session, branch, number)
        ids = history + said
        self._open[rid] = Turn(
            session, branch, number, begin, prompt=len(ids), new=len(said)
        )
        self._prompt[rid], self._said[rid] = ids, []
        return Request(rid, ids, max_new=self.load.shape.answer, arrive=FAR)

    def _look(self, poll: int) -> None:
        sch, feed = self.server.sch, self.server.sch.request_receiver
        self._count_step(sch, feed)
        sent = self.server._sent
        for message in sent[self._seen :]:
            for place, rid in enumerate(getattr(message, "rids", None) or []):
                self._heard(rid, message, place, feed)
        self._seen = len(sent)
        feed.waiting = [
            dataclasses.replace(it, arrive=poll) if self._is_due(it) else it
            for it in feed.waiting
        ]
        if self.say is not None and self.now >= self._shown:
            self._shown += SHOWN_S
            self.say(self._line(sch))

    def _count_step(self, sch: Any, feed: Feed) -> None:
        """Let the clock go on by the last step, or until the next user has thought."""
        if sch.forward_ct == self._steps:
            if len(feed.waiting) == len(self._open) and feed.waiting:
                # Nobody is served.
                due = min(self._open[it.rid].begin for it in feed.waiting)
                self.now = max(self.now, due)
            return
        self._steps, batch = sch.forward_ct, sch.last_batch
        if batch is None:
            return
        if batch.forward_mode.is_extend():
            tokens = batch.extend_num_tokens or 0
            self.now += PREFILL_S + tokens / PREFILL_TOKENS_PER_S
        else:
            self.now += DECODE_S + DECODE_REQUEST_S * batch.batch_size()

    def _is_due(self, request: Request) -> bool:
        return request.arrive == FAR and self._open[request.rid].begin <= self.now

    def _heard(self, rid: str, message: Any, place: int, feed: Feed) -> None:
        turn, ids = self._open[rid], message.output_ids
        if ids is not None and ids[place]:
            if not self._said[rid]:
                turn = dataclasses.replace(turn, first=self.now)
                self._open[rid] = turn
            self._said[rid] += ids[place]
        if not message.finished_reasons[place]:
            return
        del self._open[rid]
        said, history = self._said.pop(rid), self._prompt.pop(rid)
        self.turns.append(
            dataclasses.replace(
                turn,
                last=self.now,
                cached=message.cached_tokens[place],
                answer=len(said),
            )
        )
        shape, text = self.load.shape, history + said
        if turn.number == shape.turns:
            return
        branches = {turn.branch}
        if turn.number == shape.fork_after and self.load.forks(turn.session):
            branches.add(1)
        for branch in sorted(branches):
            going_on = self._turn(turn.session, branch, text, turn.number + 1)
            feed.waiting.append(going_on)
            feed.requests.append(going_on)

    def _line(self, sch: Any) -> str:
        store, expected = sch.tree_cache.sessions, sch.tree_cache.expected
        elsewhere = len(store.host) if store.host is not None else 0
        return (
            f"{self.now:6.1f} s: {len(self.turns)} turns, "
            f"{len(sch.running_batch.reqs)} run, {len(sch.waiting_queue)} wait, "
            f"{expected.held_back} of them for {expected.kept} tokens in "
            f"{len(store)} snapshots; {elsewhere} in host memory, "
            f"{store.evicted} evicted"
        )


def scheduler(
    folder: Path, *, pool: int, rate: float, host: float = 0
) -> InProcessScheduler:
    """A scheduler of the tiny model whose prompts may be as long as the bench's."""
    model = Path(write_tiny_model(folder, ONE_LAYER))
    config = json.loads((model / "config.json").read_text())
    config["max_position_embeddings"] = LONGEST
    (model / "config.json").write_text(json.dumps(config))
    args = make_server_args(
        str(model),
        compress=True,
        chunked_prefill_size=CHUNK,
        max_total_tokens=pool,
        max_running_requests=256,
        kv_compress_sessions=True,
        kv_compress_rate=rate,
        kv_compress_sessions_host=host,
    )
    return InProcessScheduler(args)


def main() -> None:
    """Serve a load of the bench; print and record what happened."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--rate", type=float, default=8.0)
    parser.add_argument("--host", type=float, default=0.0, help="memory, of the pool")
    args, words = parser.parse_known_args()
    bench = parse_arguments(None, words)
    what = {
        "rate": args.rate,
        "host": args.host,
        "shape": bench.shape.record(),
        "pool": bench.pool,
    }
    with tempfile.TemporaryDirectory() as folder:
        server = scheduler(
            Path(folder), pool=bench.pool, rate=args.rate, host=args.host
        )
        load = Load(bench.shape, VOCAB)
        values = TimedLoad(server, load, lambda line: print(line, flush=True)).serve()
        write_record(args.out, {**environment(), **what, **values})
        print(json.dumps(values, indent=1))


if __name__ == "__main__":
    main()
