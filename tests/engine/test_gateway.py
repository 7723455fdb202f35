"""Two servers behind SGLang's own gateway; one of them has two data-parallel ranks.

The gateway forwards the fields that it knows. It sends a conversation to where it was
before, and knows every rank (``--dp-aware``): inside a server ranks take turns.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import requests

from sglang_kvc.tools import serve
from sglang_kvc.upstream.generation import UPSTREAM, Generation22
from tests.engine.server import Server, body_of, free_port, running, tail
from tests.engine.texts import corpus, prompt

pytestmark = pytest.mark.server

GENERATE, CHAT, COMPLETIONS = "/generate", "/v1/chat/completions", "/v1/completions"
RESPONSES = "/v1/responses"
SECOND = "second"
RANKS = 3
START_S = 600

# Characters of the corpus that no other test of the server begins with.
OPTIONS_TEXT, TALKS_TEXT, APART = 50_100, 60_100, 3_000
CHARACTERS = 1_200
TALKS = 6


@pytest.fixture(scope="module")
def second(
    model_path: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server of two ranks, of the same model as the first. The last test kills it."""
    log = tmp_path_factory.mktemp("second") / "log.txt"
    # The version tells whose an answer is.
    flags = ["--dp-size", "2", "--weight-version", SECOND]
    cores = os.cpu_count() or 1
    with pytest.MonkeyPatch.context() as patch:
        # On a CPU each rank wants a core, or a NUMA node, of its own; before 0.5.22
        # only those of one replica.
        if isinstance(UPSTREAM, Generation22):
            patch.setenv("SGLANG_CPU_OMP_THREADS_BIND", f"0|{1 % cores}")
        forking = "tests.engine.forking_server"
        with running(model_path, log, flags, True, forking) as started:
            yield started


@pytest.fixture(scope="module")
def gateway(
    server: Server, second: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The gateway, once it knows all ranks."""
    port, log = free_port(), tmp_path_factory.mktemp("gateway") / "log.txt"
    command = [sys.executable, "-m", "sglang_router.launch_router"]
    command += ["--worker-urls", server.url, second.url]
    command += ["--policy", "cache_aware", "--dp-aware"]
    command += ["--health-check-interval-secs", "5", "--health-failure-threshold", "1"]
    command += ["--health-check-timeout-secs", "30"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-port", str(free_port()), "--log-level", "warn"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, start_new_session=True
        )
    started = Server(f"http://127.0.0.1:{port}", server.model, process, log)
    try:
        end = time.monotonic() + START_S
        while ranks_known(started) < RANKS:
            assert process.poll() is None and time.monotonic() < end, tail(log)
            time.sleep(0.2)
        yield started
        assert process.poll() is None, tail(log)
    finally:
        serve.stop(process)


def ranks_known(gateway: Server) -> int:
    """Ranks to which the gateway sends requests."""
    with contextlib.suppress(requests.ConnectionError):
        answer = requests.get(f"{gateway.url}/workers", timeout=30)
        if answer.status_code == 200:
            return sum(worker["is_healthy"] for worker in answer.json()["workers"])
    return 0


def text_of(start: int) -> str:
    """Some 300 tokens."""
    return corpus()[start:][:CHARACTERS]


# Options ------------------------------------------------------------------------------


def body_with(path: str, kv: str, model: str) -> dict[str, Any]:
    """A body with options in the field that the gateway lets through on this route."""
    if path == GENERATE:
        params = {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True}
        body: dict[str, Any] = {"text": text_of(OPTIONS_TEXT)}
        return {**body, "sampling_params": params, "custom_labels": {"kv_compress": kv}}
    body = {"model": model, "temperature": 0, "max_tokens": 3, "ignore_eos": True}
    body["metadata"] = {"kv_compress": kv}
    if path == RESPONSES:
        del body["max_tokens"], body["ignore_eos"]
        body["max_output_tokens"] = 3
        # Of one that is not given the gateway makes null, which SGLang refuses.
        body |= {"input": text_of(OPTIONS_TEXT), "stream": False}
    elif path == CHAT:
        body["messages"] = [{"role": "user", "content": text_of(OPTIONS_TEXT)}]
    else:
        body["prompt"] = text_of(OPTIONS_TEXT)
    return body


def events(response: requests.Response) -> Iterator[dict[str, Any]]:
    """Events of a streamed answer as they come."""
    for line in response.iter_lines():
        if line.startswith(b"data: {"):
            yield json.loads(line.removeprefix(b"data: "))


def summary(gateway: Server, path: str, body: dict[str, Any], stream: bool) -> Any:
    """What the client of the gateway is told about its cache."""
    if stream:
        more = {"stream": True}
        if path in (CHAT, COMPLETIONS):
            more["stream_options"] = {"include_usage": True}  # type: ignore[assignment]
        response = gateway.post(path, {**body, **more}, stream=True)
        assert response.status_code == 200, response.text
        answer = list(events(response))[-1]
        if path == RESPONSES:
            # What ends by its length is incomplete, from SGLang 0.5.22 on.
            assert answer["type"] in ("response.completed", "response.incomplete")
            answer = answer["response"]
        assert path in (GENERATE, RESPONSES) or answer["choices"] == []
    else:
        response = gateway.post(path, body)
        assert response.status_code == 200, response.text
        answer = response.json()
    if path == GENERATE:
        return answer["meta_info"]["kv_compress"]
    (only,) = answer["metadata"]["kv_compress"]
    return only


def is_half(kv: dict[str, Any]) -> bool:
    """Rate 2; the server's own is 4."""
    return abs(kv["budget_tokens"] - kv["logical_tokens"] / 2) <= 16


def is_96(kv: dict[str, Any]) -> bool:
    """A budget of 96."""
    return bool(kv["budget_tokens"] == 96)


def is_off(kv: dict[str, Any]) -> bool:
    """Nothing may be evicted."""
    return not kv["enabled"] and kv["budget_tokens"] is None and kv["passes"] == 0


ASKED: list[tuple[str, Callable[[dict[str, Any]], bool]]] = [
    ("rate=2", is_half),
    ('{"budget": 96}', is_96),
    ("enabled=false", is_off),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", [GENERATE, CHAT, COMPLETIONS, RESPONSES])
def test_options_arrive(gateway: Server, path: str, stream: bool) -> None:
    """By the field that the gateway lets through; the answer says that they hold."""
    for kv, holds in ASKED:
        told = summary(gateway, path, body_with(path, kv, gateway.model), stream)
        assert told["logical_tokens"] > 250
        assert holds(told), (kv, told)


@pytest.mark.parametrize("path", [GENERATE, CHAT, COMPLETIONS, RESPONSES])
def test_wrong_options_are_refused_behind_the_gateway(
    gateway: Server, path: str
) -> None:
    response = gateway.post(path, body_with(path, "rate=0.5", gateway.model))
    assert response.status_code == 400, response.text
    assert "kv_compress.rate must be a finite number >= 1" in response.text


# Prefixes and ranks -------------------------------------------------------------------


@dataclass(frozen=True)
class Talk:
    """A conversation, and what its last turn found."""

    messages: list[dict[str, str]]
    home: str
    cached: int
    tokens: int

    def turn(self, gateway: Server, text: str) -> Talk:
        """Say something; the answer becomes part of what is said next."""
        messages = [*self.messages, {"role": "user", "content": text}]
        body = {"model": gateway.model, "temperature": 0, "max_tokens": 2}
        response = gateway.post(CHAT, {**body, "messages": messages})
        assert response.status_code == 200, response.text
        answer = response.json()
        assert answer["metadata"]["kv_compress"][0]["passes"] >= 1
        said = answer["choices"][0]["message"]["content"]
        usage = answer["usage"]
        return Talk(
            [*messages, {"role": "assistant", "content": said}],
            answer["metadata"]["weight_version"],
            (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0),
            usage["prompt_tokens"],
        )


@pytest.fixture(scope="module")
def talks(gateway: Server) -> list[Talk]:
    """Conversations after their first turn.

    At the same time: what the gateway has not seen goes to where least is running.
    """
    texts = [text_of(TALKS_TEXT + APART * place) for place in range(TALKS)]
    with ThreadPoolExecutor(TALKS) as pool:
        return list(pool.map(lambda it: Talk([], "", 0, 0).turn(gateway, it), texts))


def test_follow_ups_find_their_prefix(gateway: Server, talks: list[Talk]) -> None:
    """In the same rank of the same server: the first prompt, but for its last pages."""
    # Of the chat's template a page or two is everybody's.
    assert all(first.cached <= 32 for first in talks)
    assert len({first.home for first in talks}) == 2
    for first in talks:
        later = first.turn(gateway, "And what else?")
        assert later.home == first.home
        assert later.cached >= first.tokens - 32 > 200


def test_ranks_serve_a_mix(second: Server) -> None:
    """Compressed, at another rate, or not: both ranks, and no page is lost."""
    mix: list[dict[str, Any] | None] = [None, {"rate": 2}, {"enabled": False}] * 2
    ids = [prompt(second.model, 26_000 + 200 * i, 300) for i in range(len(mix))]
    with ThreadPoolExecutor() as pool:
        infos = list(pool.map(lambda i: second.generate(ids[i], 4, mix[i]), range(6)))
    assert {info["dp_rank"] for info in infos} == {0, 1}
    for kv, info in zip(mix, infos, strict=True):
        told = info["kv_compress"]
        assert told["enabled"] == (kv is None or "rate" in kv)
        assert (told["passes"] > 0) == told["enabled"]
        if told["enabled"]:
            rate = 2 if kv else 4
            assert abs(told["budget_tokens"] - told["logical_tokens"] / rate) <= 24
    flush(second)


def flush(worker: Server) -> None:
    """Every page was given back, or the server ends."""
    response = worker.post("/flush_cache?timeout=30", {})
    assert response.status_code == 200, response.text
    time.sleep(2)
    assert requests.get(f"{worker.url}/health", timeout=60).status_code == 200


def test_a_killed_server_loses_no_others_requests(
    gateway: Server, server: Server, second: Server, talks: list[Talk]
) -> None:
    """Streams of the other one end as always; what comes later is served there."""
    count = 200

    def start(talk: Talk) -> tuple[str, Iterator[dict[str, Any]]]:
        body = body_of([], count, None) | {"stream": True}
        del body["input_ids"]
        body["text"] = talk.messages[0]["content"]
        stream = events(gateway.post(GENERATE, body, stream=True))
        return next(stream)["meta_info"]["weight_version"], stream

    with ThreadPoolExecutor(TALKS) as pool:
        streams = list(pool.map(start, talks))
    others = [stream for home, stream in streams if home != SECOND]
    lost = [stream for home, stream in streams if home == SECOND]
    assert others and lost
    os.killpg(second.process.pid, signal.SIGKILL)
    for stream in others:
        info = list(stream)[-1]["meta_info"]
        assert info["completion_tokens"] == count
        assert info["finish_reason"] == {"type": "length", "length": count}
    ends = 0
    for stream in lost:
        # They end, too, by an error or early: nobody waits for what cannot come.
        with contextlib.suppress(requests.RequestException):
            ends += any(it["meta_info"]["finish_reason"] for it in stream)
    assert ends < len(lost), "none was running when the server was killed"
    # Until its health check sees it, the gateway answers for the dead with HTTP 500.
    end = time.monotonic() + START_S
    while ranks_known(gateway) > 1:
        assert time.monotonic() < end
        time.sleep(1)
    for talk in talks:
        assert talk.turn(gateway, "Are you there?").home != SECOND
    for path in (GENERATE, COMPLETIONS):
        body = body_with(path, "rate=2", gateway.model)
        assert is_half(summary(gateway, path, body, False))
    flush(server)
