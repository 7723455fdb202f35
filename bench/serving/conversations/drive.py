"""Send the turns of all sessions over OpenAI's API, each when its user has thought."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from bench.common.client import Client
from bench.common.job import Job
from bench.common.server import Server, say
from bench.serving.conversations.load import Load

PATH = "/v1/completions"
PROGRESS_S = 5.0
LOOK_S = 0.5
WARM_SESSIONS, WARM_TURNS = 2, 2


@dataclass(frozen=True)
class Turn:
    """One turn as it was served.

    Attributes
    ----------
    session, branch, number : int
        `number` counts from 1; branch 1 is the second way of a fork.
    begin, first, last : float
        When it was sent, and when its first and last token came; by
        `time.perf_counter`.
    prompt, cached, new, answer : int
        Tokens of the prompt, those that were not computed, those that no earlier turn
        has had or said, and what came.
    ours : dict or None
        ``kv_compress`` of the answer; None for stock.
    error : str
        Empty if it was served.
    """

    session: int
    branch: int
    number: int
    begin: float
    first: float = 0.0
    last: float = 0.0
    prompt: int = 0
    cached: int = 0
    new: int = 0
    answer: int = 0
    ours: dict[str, Any] | None = None
    error: str = ""


class Drive:
    """All sessions of a load on one server.

    Parameters
    ----------
    server : Server
    load : Load
    seconds : float
        After so long turns that run are left, and no more are sent.
    stall : float
        Seconds without a token after which a turn counts as failed.
    """

    def __init__(
        self, server: Server, load: Load, *, seconds: float, stall: float
    ) -> None:
        self.server, self.load = server, load
        self.seconds, self.stall = seconds, stall
        self.turns: list[Turn] = []
        self.begin = 0.0
        self._flying = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> bool:
        """Serve everything; whether all turns were sent and answered in time."""
        async with Client(self.server.url, self.stall) as self.client:
            self.begin = time.perf_counter()
            for session in range(self.load.shape.sessions):
                self._start(session, 0, [], 1)
            await self._wait()
        errors = any(turn.error for turn in self.turns)
        return len(self.turns) == self.load.shape.all_turns and not errors

    async def warm_up(self) -> list[Turn]:
        """Serve a few turns that belong to no session, so that kernels are loaded."""
        async with Client(self.server.url, self.stall) as self.client:
            self.begin = time.perf_counter()
            last = min(WARM_TURNS, self.load.shape.turns)
            for session in range(-WARM_SESSIONS, 0):
                self._start(session, 0, [], 1, last)
            await self._wait()
        turns, self.turns = self.turns, []
        return turns

    def _start(
        self, session: int, branch: int, history: list[int], turn: int, last: int = 0
    ) -> None:
        last = last or self.load.shape.turns
        task = asyncio.create_task(self._talk(session, branch, history, turn, last))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _wait(self) -> None:
        """Until all have said everything, the time is over or the server has died."""
        end, shown = self.begin + self.seconds, self.begin
        while self._tasks and time.perf_counter() < end and self.server.alive():
            await asyncio.wait(self._tasks, timeout=LOOK_S)
            if time.perf_counter() > shown + PROGRESS_S:
                shown = time.perf_counter()
                say(self._line())
        for task in list(self._tasks):
            task.cancel()
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        for problem in ended:
            if isinstance(problem, Exception):
                raise problem

    def _line(self) -> str:
        failed = sum(bool(turn.error) for turn in self.turns)
        return (
            f"  {len(self.turns)}/{self.load.shape.all_turns} turns in "
            f"{time.perf_counter() - self.begin:.0f} s, {self._flying} running, "
            f"{failed} FAILED"
        )

    async def _talk(
        self, session: int, branch: int, history: list[int], turn: int, last: int
    ) -> None:
        """Say all turns of one branch from `turn` on."""
        load = self.load
        for number in range(turn, last + 1):
            await asyncio.sleep(load.thought(session, branch, number))
            prompt = history + load.said(session, branch, number)
            answer = await self._ask(session, branch, number, prompt)
            if answer is None:
                return
            history = prompt + answer
            forks = not branch and load.forks(session)
            if forks and number == load.shape.fork_after:
                self._start(session, 1, history, number + 1)

    async def _ask(
        self, session: int, branch: int, number: int, prompt: list[int]
    ) -> list[int] | None:
        """Send one turn and note it; the ids of its answer, None if it failed."""
        shape = self.load.shape
        body = {
            "model": "default",
            "prompt": prompt,
            "max_tokens": shape.answer,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        job = Job(
            session,
            f"turn {number}",
            PATH,
            body,
            stream=True,
            output=shape.answer,
            exact=True,
        )
        self._flying += 1
        try:
            outcome = await self.client.send(job)
        finally:
            self._flying -= 1
        told, ids = outcome.answer, outcome.answer.ids.get(0, [])
        error = outcome.detail or "failed" if outcome.failed else ""
        if not error and outcome.result != "ok":
            error = f"{outcome.result}: {outcome.detail}"
        if not error and len(ids) != shape.answer:
            error = f"{len(ids)} ids came, not {shape.answer}"
        details = told.usage.get("prompt_tokens_details") or {}
        who = {"session": session, "branch": branch, "number": number}
        if error:
            self.turns.append(Turn(**who, begin=told.begin, error=error))
            return None
        self.turns.append(
            Turn(
                **who,
                begin=told.begin,
                first=told.times[0],
                last=told.times[-1],
                prompt=told.tokens("prompt_tokens"),
                cached=int(details.get("cached_tokens") or 0),
                new=shape.new(number),
                answer=len(ids),
                ours=(told.metadata.get("kv_compress") or [None])[0],
            )
        )
        return ids
