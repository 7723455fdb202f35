"""Run the soak: who is sent when, canaries beside it, and what is checked after."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from bench.common.client import STALLED, Client, Outcome
from bench.common.gpu_memory import GpuMemory
from bench.common.job import Job
from bench.common.server import Server, ServerError, say
from bench.soak.load import Load
from bench.soak.report import SHOWN_FAILURES, Tally, growth_per_thousand, settled_after

MAX_STALLED = 5
"""So many requests without a token, and the server is taken for stuck."""
QUIET_CANARIES = 20
BAR = 24


class Soak:
    """One soak of one server.

    Parameters
    ----------
    server : Server
    load : Load
    seconds : float
        No request is sent after so long.
    concurrency : int
        Requests at once, at most.
    burst : int
        After so many requests all wait, and the next come at once.
    pause : float
        Seconds before a burst.
    canary_every : float
        Seconds between small requests whose latency is measured.
    stall : float
        Seconds without a token that are too many.
    memory_every : int
        Requests between two samples of memory.
    """

    def __init__(
        self,
        server: Server,
        load: Load,
        *,
        seconds: float,
        concurrency: int,
        burst: int,
        pause: float,
        canary_every: float,
        stall: float,
        memory_every: int,
    ) -> None:
        self.server, self.load, self.seconds = server, load, seconds
        self.concurrency, self.burst, self.pause = concurrency, burst, pause
        self.canary_every, self.stall = canary_every, stall
        self.memory_every = memory_every
        self.tally = Tally()
        self.gpu = GpuMemory()
        self.samples: dict[str, list[tuple[int, float]]] = {}
        self.dump = ""
        self.sent = 0
        self._running: set[asyncio.Task[None]] = set()
        self._flying: dict[int, Job] = {}
        self._canaries = 0
        self._stalled = 0
        self._begin = 0.0

    async def run(self) -> dict[str, Any]:
        """Send everything, wait for everything, check; the record."""
        async with Client(self.server.url, self.stall) as client:
            self.client = client
            for _ in range(QUIET_CANARIES):
                await self._canary("quiet")
                if self.tally.failed:
                    break
            self._sample(0)
            self._begin = time.monotonic()
            beside = [asyncio.create_task(self._canaries_beside())]
            beside += [asyncio.create_task(self._progress())]
            try:
                await self._feed()
                await self._drain()
            finally:
                for task in beside:
                    task.cancel()
                await asyncio.gather(*beside, return_exceptions=True)
            seconds = time.monotonic() - self._begin
            say(self._line())
            after = await self._after()
        self.gpu.stop()
        return {
            **self.tally.record(),
            **after,
            "seconds": round(seconds, 1),
            "sent": self.sent,
            "aborts_sent": self.client.aborts_sent,
            "left_out": self.load.left_out(),
            "memory": self._memory(),
            "dump": self.dump,
        }

    # Sending --------------------------------------------------------------------------

    def _stuck(self) -> bool:
        return self._stalled >= MAX_STALLED or not self.server.alive()

    async def _feed(self) -> None:
        for index in range(self.load.shape.requests):
            if index and index % self.burst == 0:
                await self._until(self.concurrency // 8)
                await asyncio.sleep(self.pause)
            else:
                await self._until(self.concurrency - 1)
            if self._stuck() or time.monotonic() - self._begin > self.seconds:
                return
            task = asyncio.create_task(self._one(self.load.job(index)))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            self.sent += 1
            # Small enough not to matter, and others of this loop get their turn.
            await asyncio.sleep(0)

    async def _until(self, most: int) -> None:
        """Wait until at most so many requests run."""
        while len(self._running) > most and not self._stuck():
            await asyncio.wait(
                self._running, timeout=1, return_when=asyncio.FIRST_COMPLETED
            )

    async def _drain(self) -> None:
        """Let the last ones finish; requests stall by themselves if they do not."""
        end = time.monotonic() + 2 * self.stall + 60
        while self._running and not self._stuck() and time.monotonic() < end:
            await asyncio.wait(self._running, timeout=1)
        left = list(self._running)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        if left:
            self.tally.fail("drain", f"{len(left)} requests had not ended")

    async def _one(self, job: Job) -> None:
        self._flying[job.index] = job
        outcome = await self.client.send(job)
        self.tally.add(outcome)
        await self._seen(outcome)
        self._flying.pop(job.index)
        if self.tally.done % self.memory_every == 0:
            self._sample(self.tally.done)

    async def _canary(self, phase: str) -> None:
        self._canaries += 1
        outcome = await self.client.send(self.load.canary(self._canaries))
        self.tally.add_canary(outcome, phase)
        await self._seen(outcome)

    async def _canaries_beside(self) -> None:
        tasks = set()
        while True:
            if len(tasks) < 8:
                task = asyncio.create_task(self._canary("loaded"))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.sleep(self.canary_every)

    async def _seen(self, outcome: Outcome) -> None:
        """Dump what the server says when something hangs or it has died."""
        if outcome.failed and self.tally.failed <= SHOWN_FAILURES:
            say(f"UNEXPECTED: {outcome.job.kind}: {outcome.detail}")
        if outcome.result == STALLED:
            self._stalled += 1
        died = outcome.failed and not self.server.alive()
        if not self.dump and (died or outcome.result == STALLED):
            self.dump = "..."
            if died:
                flying = ", ".join(sorted({job.kind for job in self._flying.values()}))
                self.tally.fail("the server died", f"in flight: {flying}", first=True)
            self.dump = await asyncio.to_thread(self.server.dump)
            say(self.dump)

    # Watching -------------------------------------------------------------------------

    async def _progress(self) -> None:
        while True:
            await asyncio.sleep(5)
            say(self._line())

    def _line(self) -> str:
        done, asked = self.tally.done, self.load.shape.requests
        part = min(done / max(asked, 1), 1)
        bar = "#" * int(BAR * part)
        counts = self.tally.results
        return (
            f"[{bar:<{BAR}}] {done}/{asked} in {time.monotonic() - self._begin:.0f} s, "
            f"{len(self._running)} running, {counts['ok']} ok, {counts['refused']} "
            f"refused, {counts['aborted']} aborted, {counts['left']} left, "
            f"{self.tally.failed} UNEXPECTED"
        )

    def _sample(self, done: int) -> None:
        values = self.server.memory()
        if self.gpu.now is not None:
            values["GPU"] = float(self.gpu.now)
        for name, value in values.items():
            self.samples.setdefault(name, []).append((done, round(value, 1)))

    def _memory(self) -> dict[str, dict[str, Any]]:
        skip = settled_after(self.tally.done)
        return {
            name: {
                "start": samples[0][1],
                "settled": next((v for done, v in samples if done >= skip), None),
                "end": samples[-1][1],
                "growth": growth_per_thousand(samples, skip),
                "samples": samples,
            }
            for name, samples in self.samples.items()
        }

    # Afterwards -----------------------------------------------------------------------

    async def _after(self) -> dict[str, Any]:
        """Idle, whole, flushed, whole, and it still answers."""
        values: dict[str, Any] = {"pool": self.load.limits.pool, "flushed": False}
        try:
            # A client that left is noticed within seconds.
            idle = await asyncio.to_thread(self.server.wait_idle, self.stall)
            values["used_when_idle"] = idle["num_used_tokens"]
            self._sample(self.tally.done)
            await asyncio.to_thread(self.server.flush)
            values["flushed"] = True
            for _ in range(QUIET_CANARIES):
                await self._canary("after")
            idle = await asyncio.to_thread(self.server.wait_idle, self.stall)
            values["used_after_flush"] = idle["num_used_tokens"]
        except (OSError, ServerError, KeyError) as error:
            self.tally.fail("after the load", f"{type(error).__name__}: {error}")
            self.dump = self.dump or await asyncio.to_thread(self.server.dump)
        values["alive"] = self.server.alive()
        if not values["alive"]:
            self.tally.fail("after the load", "the server has died")
        return values
