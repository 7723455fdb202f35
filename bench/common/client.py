"""A client under load: send a request, watch the answer, say what became of it."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from bench.common.job import EITHER, REFUSED, REGEX, Job

SERVED, TURNED_DOWN, ABORTED, LEFT = "ok", "refused", "aborted", "left"
LATE, STALLED, UNEXPECTED = "too late to cut", "stalled", "unexpected"
"""How requests end. `LATE`: finished before it could be aborted or left."""
LONGEST_MESSAGE = 2000
ABORT_AGAIN_S = 0.5
KEEP_ALIVE = 2.0
"""Seconds after which an idle connection is not used again; the server's limit is 5."""
_LINE = 1 << 22


@dataclass
class Answer:
    """What came back, as it came.

    Parameters
    ----------
    status : int
        Of HTTP, or the code of an error event, or of an aborted request.
    finishes, infos, texts, ids : dict
        By the number of the choice.
    usage, metadata : dict
        Of an OpenAI answer.
    times : list of float
        When events with tokens came, by `time.perf_counter`.
    """

    begin: float = 0.0
    end: float = 0.0
    status: int = 0
    message: str = ""
    problem: str = ""
    timed_out: bool = False
    left: bool = False
    finishes: dict[int, str] = field(default_factory=dict)
    infos: dict[int, dict[str, Any]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    ids: dict[int, list[int]] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)

    def absorb(self, event: Any) -> None:
        """Take a JSON body, or one event of a stream."""
        if isinstance(event, list):
            for index, one in enumerate(event):
                self._absorb_one({"index": index, **one})
        elif isinstance(event, dict):
            self._absorb_one(event)
        else:
            self.problem = f"not an answer: {str(event)[:100]}"

    def _absorb_one(self, event: dict[str, Any]) -> None:
        error = event if event.get("object") == "error" else event.get("error")
        if error:
            error = error if isinstance(error, dict) else {"message": error}
            self.message = str(error.get("message", ""))
            code = error.get("code")
            if self.status == 200:
                self.status = code if isinstance(code, int) else 400
            return
        self.usage = event.get("usage") or self.usage
        self.metadata = event.get("metadata") or self.metadata
        for choice in event.get("choices") or ():
            self._absorb_choice(choice)
        if "meta_info" in event:
            index, info = event.get("index", 0), event["meta_info"]
            self.infos[index] = info
            self.texts[index] = event.get("text") or ""
            finish = info.get("finish_reason")
            if finish:
                self._finish(index, finish)

    def _absorb_choice(self, choice: dict[str, Any]) -> None:
        index = choice.get("index", 0)
        part = choice.get("delta") or choice.get("message") or choice
        text = part.get("content") or part.get("text") or ""
        self.texts[index] = self.texts.get(index, "") + text
        if choice.get("token_ids"):
            self.ids.setdefault(index, []).extend(choice["token_ids"])
        if choice.get("meta_info"):
            self.infos[index] = choice["meta_info"]
        if choice.get("finish_reason"):
            self._finish(index, choice["finish_reason"])

    def _finish(self, index: int, finish: Any) -> None:
        if isinstance(finish, dict):
            code = finish.get("status_code")
            if finish.get("type") == "abort" and code:
                self.status = int(code)
                self.message = str(finish.get("message", ""))
            finish = finish.get("type", "")
        self.finishes[index] = str(finish)

    def tokens(self, name: str) -> int:
        """Sum of ``prompt_tokens`` or ``completion_tokens`` over all choices."""
        if self.infos:
            return sum(info.get(name) or 0 for info in self.infos.values())
        return int(self.usage.get(name) or 0)

    @property
    def first(self) -> float | None:
        """Seconds to the first token of a stream."""
        return self.times[0] - self.begin if self.times else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between events of a stream."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return [after - before for before, after in pairs]


@dataclass(frozen=True)
class Outcome:
    """A request and what became of it."""

    job: Job
    answer: Answer
    result: str
    detail: str = ""

    @property
    def failed(self) -> bool:
        """Whether it should not have ended like this."""
        return self.result in (STALLED, UNEXPECTED)


def judge(job: Job, answer: Answer) -> Outcome:
    """Compare an answer with what was expected."""

    def ends(result: str, detail: str = "") -> Outcome:
        return Outcome(job, answer, result, detail[:300])

    if answer.left:
        return ends(LEFT)
    if answer.timed_out:
        return ends(STALLED, f"no token for too long ({len(answer.times)} came)")
    if answer.problem:
        return ends(UNEXPECTED, answer.problem)
    if answer.status == 400:
        if job.act == "abort" and "abort" in answer.message.lower():
            return ends(ABORTED)
        if job.expect not in (REFUSED, EITHER):
            return ends(UNEXPECTED, f"refused: {answer.message}")
        if job.short and len(answer.message) > LONGEST_MESSAGE:
            length = len(answer.message)
            return ends(UNEXPECTED, f"a message of {length} characters")
        return ends(TURNED_DOWN, answer.message)
    if answer.status != 200:
        return ends(UNEXPECTED, f"status {answer.status}: {answer.message}")
    if job.expect == REFUSED:
        return ends(UNEXPECTED, "served, but it has to be refused")
    if len(answer.finishes) < job.n:
        return ends(UNEXPECTED, "the answer ended without a finish_reason")
    if "abort" in answer.finishes.values():
        if job.act == "abort":
            return ends(ABORTED)
        return ends(UNEXPECTED, "aborted by nobody")
    if wrong := _wrong_content(job, answer):
        return ends(UNEXPECTED, wrong)
    return ends(LATE if job.act else SERVED)


def _wrong_content(job: Job, answer: Answer) -> str:
    """What is wrong with a finished answer; empty if nothing is."""
    came = answer.tokens("completion_tokens")
    if job.exact and came != job.n * job.output:
        return f"{came} tokens came, {job.n * job.output} were asked for"
    # One that ran into its limit is no JSON yet.
    if job.pattern and answer.finishes[0] == "stop":
        text = answer.texts[0]
        if job.pattern == "regex" and not re.fullmatch(REGEX, text):
            return f"not of the regular expression: {text!r}"
        if job.pattern == "json" and not _is_json(text):
            return f"not JSON: {text!r}"
    return ""


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


class Client:
    """Sends requests over a session with as many connections as are needed.

    Parameters
    ----------
    url : str
    stall : float
        Seconds without a token after which a request counts as stalled; a plain
        request, which answers at its end, has twice as long.
    """

    def __init__(self, url: str, stall: float) -> None:
        self.url, self.stall = url, stall
        self.aborts_sent = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Client:
        """Open the session."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE),
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=_LINE,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the session."""
        for task in self._tasks:
            task.cancel()
        await self._session.close()

    async def send(self, job: Job) -> Outcome:
        """Send one request, and abort or leave it as it says."""
        answer = Answer(begin=time.perf_counter())
        ended = asyncio.Event()
        exchange: Coroutine[Any, Any, None] = self._exchange(job, answer, ended)
        try:
            if job.act == "leave" and job.after_seconds is not None:
                await asyncio.wait_for(exchange, job.after_seconds)
            else:
                if job.act == "abort" and job.after_seconds is not None:
                    self._start(self._abort(job, job.after_seconds, ended))
                await exchange
        except aiohttp.ServerTimeoutError:
            answer.timed_out = True
        except asyncio.TimeoutError:
            answer.left = True
        except (aiohttp.ClientError, OSError, ValueError) as error:
            answer.problem = f"{type(error).__name__}: {error}"
        finally:
            ended.set()
        answer.end = time.perf_counter()
        return judge(job, answer)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _exchange(self, job: Job, answer: Answer, ended: asyncio.Event) -> None:
        wait = self.stall if job.stream else 2 * self.stall
        async with self._session.post(
            self.url + job.path,
            data=job.encoded(),
            headers={"Content-Type": "application/json"},
            timeout=aiohttp.ClientTimeout(total=None, sock_read=wait),
        ) as response:
            answer.status = response.status
            if not job.stream or response.status != 200:
                body = await response.read()
                try:
                    answer.absorb(orjson.loads(body))
                except ValueError:
                    answer.message = body[:300].decode(errors="replace")
                    if response.status == 200:
                        answer.problem = f"not JSON: {answer.message}"
                return
            async for line in response.content:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                answer.absorb(orjson.loads(line[6:]))
                if answer.status != 200:
                    continue
                answer.times.append(time.perf_counter())
                if len(answer.times) == job.after_events:
                    if job.act == "leave":
                        answer.left = True
                        response.close()
                        return
                    self._start(self._abort(job, 0, ended))

    async def _abort(self, job: Job, after: float, ended: asyncio.Event) -> None:
        """Abort by id until it has ended: an abort may overtake its request."""
        self.aborts_sent += 1
        while True:
            try:
                await asyncio.wait_for(ended.wait(), after)
                return
            except asyncio.TimeoutError:
                after = ABORT_AGAIN_S
            try:
                body = {"rid": job.rid}
                async with self._session.post(self.url + "/abort_request", json=body):
                    pass
            except (aiohttp.ClientError, OSError):
                return
