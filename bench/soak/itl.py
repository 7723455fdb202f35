"""What one hostile client does to the inter-token latency of ordinary streams.

Phases: the streams alone; beside a client that sends refused requests and requests at
rate 1.01 as fast as it can, one after the other; beside one that sends refused requests
only; beside one that sends the prompts of the first at the server's own rate; alone
again. The streams send the same prompts in every phase, and the prefix cache is flushed
between them. The other client is a process of its own, so that it takes no time from
the clocks of the streams.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import multiprocessing
import random
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from bench.common.client import Client, Outcome
from bench.common.job import Job
from bench.common.percentiles import percentile
from bench.common.server import Server, ServerError, say
from bench.soak.hostile import OPTIONS
from bench.soak.limits import Limits
from bench.soak.report import (
    SHOWN_FAILURES,
    Tally,
    format_failures,
    grid,
)

ALONE, AGAIN = "alone", "alone again"
HOSTILE, REFUSED, POLITE = "hostile", "refused only", "polite"
PHASES = (ALONE, HOSTILE, REFUSED, POLITE, AGAIN)
STOCK_PHASES = (ALONE, POLITE, AGAIN)
SHARES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
REFUSED_BETWEEN = 3
"""Refused requests for each at rate 1.01."""
WARM_UP = 3
OTHER_START = 60


def tokens(rng: random.Random, limits: Limits, low: int, high: int) -> list[int]:
    """A prompt of its own, `low` to `high` tokens long."""
    ids = range(min(100, limits.vocab // 4), limits.vocab)
    return rng.choices(ids, k=rng.randint(low, high))


@dataclass(frozen=True)
class Other:
    """The other client: its phase, its prompts, and what it does not send."""

    phase: str
    limits: Limits
    lengths: tuple[int, int]
    seed: int = 0
    without: frozenset[str] = frozenset()


def other_bodies(about: Other) -> Iterator[tuple[str, bytes]]:
    """What the other client sends, without end: kind and JSON."""
    wrong = [option for option in OPTIONS if option.kind not in about.without]
    rng = random.Random(f"{about.seed}:other")
    for number in range(1 << 62):
        ids = tokens(rng, about.limits, *about.lengths)
        params: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True}
        if about.phase != POLITE:
            for refused in range(REFUSED_BETWEEN):
                bad = wrong[(number * REFUSED_BETWEEN + refused) % len(wrong)]
                body = {"input_ids": ids[:8], "sampling_params": dict(params)}
                yield bad.kind, bad.spoil(body, about.limits)
            if about.phase == REFUSED:
                continue
            params["custom_params"] = {"kv_compress": {"rate": 1.01}}
        body = {"input_ids": ids, "sampling_params": params}
        yield (
            "rate 1.01" if about.phase == HOSTILE else "polite",
            json.dumps(body).encode(),
        )


def other_client(url: str, about: Other, pipe: Connection) -> None:
    """Send until the pipe says stop; answer how often each kind had which status."""
    place = urllib.parse.urlsplit(url)
    assert place.hostname
    said: Counter[str] = Counter()
    pipe.send("begun")
    link = http.client.HTTPConnection(place.hostname, place.port, timeout=600)
    for kind, body in other_bodies(about):
        if pipe.poll():
            break
        try:
            link.request(
                "POST", "/generate", body, {"Content-Type": "application/json"}
            )
            answer = link.getresponse()
            answer.read()
            said[f"{answer.status} {kind}"] += 1
        except (OSError, http.client.HTTPException) as error:
            said[f"{type(error).__name__} {kind}"] += 1
            link.close()
            time.sleep(0.1)
    pipe.send(dict(said))


class Phase:
    """Streams in a closed loop for so many seconds."""

    def __init__(self, args: argparse.Namespace, limits: Limits, url: str) -> None:
        self.args, self.limits, self.url = args, limits, url
        self.outcomes: list[Outcome] = []

    def job(self, stream: int, turn: int) -> Job:
        """Request `turn` of a stream."""
        rng = random.Random(f"{self.args.seed}:{stream}:{turn}")
        # Of several lengths: streams that end together also begin together, and their
        # prompts would disturb nobody.
        mean = self.args.stream_tokens
        count = rng.randint(mean // 2, mean * 3 // 2)
        params = {"temperature": 0, "max_new_tokens": count, "ignore_eos": True}
        body = {
            "input_ids": tokens(rng, self.limits, *self.args.stream_len),
            "sampling_params": params,
            "stream": True,
        }
        kind = f"stream {stream}"
        return Job(turn, kind, "/generate", body, stream=True, output=count, exact=True)

    async def run(self, seconds: float) -> None:
        """All streams until the time is over; each ends the request that it has."""
        end = time.perf_counter() + seconds

        async def loop(client: Client, stream: int) -> None:
            turn = 0
            while time.perf_counter() < end:
                outcome = await client.send(self.job(stream, turn))
                self.outcomes.append(outcome)
                turn += 1
                if outcome.failed:
                    return

        async with Client(self.url, self.args.stall) as client:
            loops = (loop(client, stream) for stream in range(self.args.streams))
            await asyncio.gather(*loops)

    def gaps(self, until: float) -> list[float]:
        """Seconds between tokens before `until`, when no stream has ended yet."""
        found = []
        for outcome in self.outcomes:
            times = [at for at in outcome.answer.times if at < until]
            found += [b - a for a, b in zip(times, times[1:], strict=False)]
        return found


def summarize(phase: Phase, begin: float, seconds: float) -> dict[str, Any]:
    """Figures of a phase."""
    gaps = phase.gaps(begin + seconds)
    firsts = [one.answer.first for one in phase.outcomes if one.answer.first]
    values: dict[str, Any] = {"requests": len(phase.outcomes), "gaps": len(gaps)}
    for name, share in SHARES:
        found = percentile(gaps, share)
        values[f"{name}_ms"] = found and round(1000 * found, 2)
    first = percentile(firsts, 0.5)
    values["first_token_ms"] = first and round(1000 * first, 1)
    values["tokens_per_s"] = round((len(gaps) + len(firsts)) / seconds, 1)
    return values


def measure(args: argparse.Namespace, server: Server, limits: Limits) -> dict[str, Any]:
    """All phases; the record."""
    phases: dict[str, Any] = {}
    tally, dump = Tally(), ""
    try:
        warm = Phase(args, limits, server.url)
        asyncio.run(warm.run(min(WARM_UP, args.phase_seconds)))
        for name in args.phases or (STOCK_PHASES if args.stock else PHASES):
            server.wait_idle(args.stall)
            server.flush()
            say(f"{name}: {args.phase_seconds:.0f} s")
            phases[name] = _measure_one(name, args, server.url, limits, tally)
        server.wait_idle(args.stall)
    except (OSError, ServerError) as error:
        tally.fail("the server", f"{type(error).__name__}: {error}", first=True)
        dump = server.dump()
        say(dump)
    failures = tally.failures[:SHOWN_FAILURES]
    values = {"phases": phases, "failed": tally.failed, "failures": failures}
    return {**values, "dump": dump, "without": sorted(args.without)}


def _measure_one(
    name: str, args: argparse.Namespace, url: str, limits: Limits, tally: Tally
) -> dict[str, Any]:
    """One phase; what goes wrong is told to the tally."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    other = None
    if name in (HOSTILE, REFUSED, POLITE):
        low, high = args.hostile_len
        about = Other(name, limits, (low, high), args.seed, args.without)
        other = context.Process(
            target=other_client, args=(url, about, theirs), daemon=True
        )
        other.start()
        # It says when it has begun: a process takes a second to start.
        ours.poll(OTHER_START)
        ours.recv()
    phase, begin = Phase(args, limits, url), time.perf_counter()
    asyncio.run(phase.run(args.phase_seconds))
    values = summarize(phase, begin, args.phase_seconds)
    if other is not None:
        ours.send("stop")
        sent = ours.recv() if ours.poll(args.stall) else {"no answer": 1}
        values["sent"] = dict(sorted(sent.items()))
        for kind, times in sent.items():
            if kind.split()[0] != _expected(kind):
                tally.fail(name, f"{times} x {kind}")
        other.join(10)
        if other.is_alive():
            other.kill()
    for one in phase.outcomes:
        if one.failed:
            tally.fail(f"{name}, a stream", one.detail)
    return values


def _expected(kind: str) -> str:
    """Status that a request of the other client has to have."""
    return "200" if kind.endswith(("rate 1.01", "polite")) else "400"


def format_phases(values: dict[str, Any]) -> str:
    """The table of the phases, and what the other clients sent."""
    phases = values["phases"]
    rows = []
    for name, row in phases.items():
        ratios = [_ratio(row, phases.get(base, row)) for base in (ALONE, AGAIN)]
        sent = sum(row.get("sent", {}).values())
        figures = [row[f"{label}_ms"] for label, _ in SHARES]
        rows.append(
            [name, row["requests"], *figures, *ratios, row["tokens_per_s"], sent]
        )
    head = ["inter-token, ms", "requests", *(label for label, _ in SHARES)]
    head += ["p99/alone", "p99/again", "tokens/s", "others sent"]
    parts = [grid(head, rows)]
    for name, row in phases.items():
        if row.get("sent"):
            parts.append(grid([f"{name} sent", "times"], list(row["sent"].items())))
    return "\n\n".join([*parts, format_failures(values)])


def _ratio(row: dict[str, Any], base: dict[str, Any]) -> str:
    """p99 over that of another phase."""
    if not row["p99_ms"] or not base["p99_ms"]:
        return ""
    return f"{row['p99_ms'] / base['p99_ms']:.3f}"
