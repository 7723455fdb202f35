"""One HTTP server on the CPU, used as its users do: curl, OpenAI, sgl programs."""

from __future__ import annotations

import json
import shlex
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import requests

from sglang_kvc.config.pages import floor_tokens
from sglang_kvc.tools import serve
from tests.engine.server import INTERVAL, MIN_BUDGET, Server, body_of
from tests.engine.texts import corpus, prompt

pytestmark = pytest.mark.server

# Two pages: a pass may come one step late, and waits for a whole page.
SLACK = 32

# Regions of the corpus. Only tests of the prefix cache must not share theirs.
LONG, SHARED, FLUSHED = 0, 20_000, 24_000

# Of a report: what only grows while a request runs.
COUNTED = ("logical_tokens", "passes")


def check_bounded(kv: dict[str, Any]) -> None:
    """A compressed request holds its budget, what one interval adds, and slack."""
    assert kv["resident_tokens"] <= kv["budget_tokens"] + INTERVAL + SLACK


# Native API ---------------------------------------------------------------------------


def test_stream_stays_within_its_budget(server: Server) -> None:
    """Every chunk reports; the logical length grows, the resident one does not."""
    chunks = list(server.stream(prompt(server.model, LONG, 700), 40))
    reports = [chunk["meta_info"]["kv_compress"] for chunk in chunks]
    assert len(reports) > 10
    assert all(isinstance(kv, dict) for kv in reports)
    for kv in reports[1:]:
        check_bounded(kv)
    logical = [kv["logical_tokens"] for kv in reports]
    assert logical == sorted(logical)
    assert 700 <= logical[0] < 710
    assert logical[-1] >= 700 + 38
    # Rate 4 is the default: the budget follows the length.
    assert reports[-1]["budget_tokens"] in (176, 192)
    assert reports[-1]["passes"] >= 2


def test_every_answer_has_a_report_of_its_own(server: Server) -> None:
    """Of two to one prompt, streamed as they come or sent whole: a dict, the newest."""
    ids, max_new = prompt(server.model, LONG, 700), 40
    body = body_of(ids, max_new, None)
    body["sampling_params"]["n"] = 2
    whole = server.post("/generate", body).json()
    last: dict[int, dict[str, Any]] = {}
    for chunk in server.stream(ids, max_new, answers=2):
        before = last.get(chunk["index"], dict.fromkeys(COUNTED, 0))
        last[chunk["index"]] = after = chunk["meta_info"]["kv_compress"]
        assert all(after[key] >= before[key] for key in COUNTED)
    assert sorted(last) == [0, 1]
    for kv in (
        *last.values(),
        *(answer["meta_info"]["kv_compress"] for answer in whole),
    ):
        assert kv["logical_tokens"] >= 700 + max_new - 2
        assert kv["passes"] >= 2
        assert set(kv) == set(last[0])


@pytest.mark.parametrize("kv", [{"rate": 8}, {"budget": 96}])
def test_request_chooses_its_budget(server: Server, kv: dict[str, Any]) -> None:
    """Rate 8 of 700 tokens, in whole pages, is a budget of 96."""
    info = server.generate(prompt(server.model, LONG, 700), 20, kv)["kv_compress"]
    assert info["enabled"]
    assert info["budget_tokens"] == 96
    check_bounded(info)
    assert info["logical_tokens"] >= 700 + 18


def test_min_budget_of_the_server_holds(server: Server) -> None:
    """A rate cannot ask for less than --kv-compress-min-budget."""
    info = server.generate(prompt(server.model, LONG, 300), 4, {"rate": 50})
    assert info["kv_compress"]["budget_tokens"] == MIN_BUDGET


def test_request_keeps_everything(server: Server) -> None:
    """enabled: false reports, too: nothing was evicted."""
    kv = {"enabled": False}
    info = server.generate(prompt(server.model, LONG, 700), 20, kv)["kv_compress"]
    assert not info["enabled"]
    assert info["budget_tokens"] is None
    assert info["passes"] == 0
    assert info["resident_tokens"] == info["logical_tokens"] >= 700 + 18


def test_prefix_is_shared(server: Server) -> None:
    """A compressed request leaves its prompt to the next one, whole."""
    prefix = prompt(server.model, SHARED, 600)
    first = server.generate(prefix + prompt(server.model, SHARED + 1000, 40))
    second = server.generate(prefix + prompt(server.model, SHARED + 2000, 40))
    assert first["kv_compress"]["passes"] >= 1
    assert first["cached_tokens"] == 0
    assert second["cached_tokens"] == floor_tokens(600)


def test_flush_and_idle_check(server: Server) -> None:
    """No page is lost, and none held by a client that left; or the server ends."""
    ids = prompt(server.model, FLUSHED, 200)
    left = server.stream(ids, 4000)
    next(left)
    left.close()  # type: ignore[attr-defined]
    assert server.generate(ids)["cached_tokens"] > 0
    response = server.post("/flush_cache?timeout=30", {})
    assert response.status_code == 200, response.text
    assert server.generate(ids)["cached_tokens"] == 0
    time.sleep(2)
    assert requests.get(f"{server.url}/health", timeout=60).status_code == 200
    assert server.process.poll() is None


# Wrong options ------------------------------------------------------------------------


WRONG: list[tuple[Any, str]] = [
    ({"rate": 0.5}, "kv_compress.rate must be a finite number >= 1"),
    ({"bugdet": 3}, "Did you mean 'budget'?"),
    ({"budget": 16}, "needs at least 48 tokens"),
    (8, "must be an object"),
]


def test_wrong_option_costs_only_its_request(
    server: Server, client: openai.OpenAI
) -> None:
    """HTTP 400 from both APIs, while the requests that ``make serve`` prints run."""
    # Shorter, but long enough for a pass: 80 tokens, with a budget of 64.
    printed = serve.curl_lines(server.url).replace(": 128", ": 80")
    commands = printed.replace("\\\n", " ").split("\n\n")
    with ThreadPoolExecutor() as pool:
        good = [pool.submit(run_curl, command) for command in commands]
        time.sleep(1)
        check_wrong_options(server, client)
        native, chat = [future.result().json() for future in good]
    assert native["meta_info"]["completion_tokens"] == 80
    assert native["meta_info"]["kv_compress"]["passes"] >= 1
    assert chat["choices"][0]["message"]["content"]


def check_wrong_options(server: Server, client: openai.OpenAI) -> None:
    """Send `WRONG` to all endpoints that answer before a stream starts."""
    for wrong, message in WRONG:
        response = server.post("/generate", body_of([1, 2, 3], 8, wrong))
        assert response.status_code == 400
        assert message in response.json()["error"]["message"]
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as error:
                client.chat.completions.create(
                    model="default",
                    messages=[{"role": "user", "content": "Hello"}],
                    stream=stream,
                    extra_body={"custom_params": {"kv_compress": wrong}},
                )
            assert message in error.value.response.json()["message"]


def run_curl(command: str) -> requests.Response:
    """Send what a printed curl command would."""
    words = shlex.split(command)
    assert words[:2] == ["curl", "-s"]
    name, _, value = words[words.index("-H") + 1].partition(": ")
    body = words[words.index("-d") + 1]
    return requests.post(words[2], body, headers={name: value}, timeout=600)


def test_wrong_option_of_a_stream(server: Server) -> None:
    """SGLang has sent HTTP 200 by then; the error is the only event."""
    body = {**body_of([1, 2, 3], 8, {"rate": 0.5}), "stream": True}
    text = server.post("/generate", body).text
    (event, done) = text.strip().split("\n\n")
    assert done == "data: [DONE]"
    error = json.loads(event.removeprefix("data: "))["error"]
    assert error["code"] == 400
    assert "kv_compress.rate must be" in error["message"]


# OpenAI API ---------------------------------------------------------------------------


def test_chat(client: openai.OpenAI) -> None:
    """extra_body carries the options in and meta_info out, for every choice."""
    question = f"Summarize:\n\n{corpus()[:1500]}"
    answer = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=12,
        n=2,
        extra_body={
            "custom_params": {"kv_compress": {"budget": 64}},
            "return_meta_info": True,
        },
    )
    assert answer.usage is not None
    assert len(answer.choices) == 2
    for choice in answer.choices:
        assert choice.message.content
        kv = choice.meta_info["kv_compress"]  # type: ignore[attr-defined]
        assert kv["logical_tokens"] >= answer.usage.prompt_tokens > 300
        assert kv["budget_tokens"] == 64
        assert kv["passes"] >= 1
        check_bounded(kv)


def test_streamed_chat(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": f"Continue: {corpus()[:800]}"}],
        temperature=0,
        max_tokens=8,
        stream=True,
        extra_body={"custom_params": {"kv_compress": {"budget": 64}}},
    )
    pieces = [c.choices[0].delta.content for c in stream if c.choices]
    assert "".join(piece or "" for piece in pieces)


# SGLang's frontend language -----------------------------------------------------------


@pytest.mark.parametrize("settings", [None, {"budget": 96}])
def test_frontend_program(server: Server, settings: dict[str, Any] | None) -> None:
    """The server's settings hold for programs; a subclass carries their own."""
    from sglang import RuntimeEndpoint

    from tests.engine import frontend

    if settings is None:
        backend = RuntimeEndpoint(server.url)
    else:
        backend = frontend.KVCompressEndpoint(server.url, **settings)
    state = frontend.read.run(text=corpus()[3000:5400], backend=backend)
    assert state.error() is None
    assert state["topic"] in ("programming", "cooking")
    assert state["summary"]
    info = state.get_meta_info("summary")
    assert info["cached_tokens"] > 0
    for kv in (info["kv_compress"], *state["kv"]):
        expected = -(-kv["logical_tokens"] // 64) * 16 if settings is None else 96
        assert abs(kv["budget_tokens"] - expected) <= 16
        assert kv["passes"] >= 1
        check_bounded(kv)


def test_streamed_frontend_program(server: Server) -> None:
    from tests.engine import frontend

    backend = frontend.KVCompressEndpoint(server.url, enabled=False)
    state = frontend.read.run(text=corpus()[3000:3600], backend=backend, stream=True)
    assert "".join(state.text_iter("summary"))
    kv = state.get_meta_info("summary")["kv_compress"]
    assert not kv["enabled"]


@pytest.mark.filterwarnings("ignore:Error in stream_executor")
def test_frontend_program_with_a_wrong_setting(server: Server) -> None:
    from tests.engine import frontend

    state = frontend.ask.run(backend=frontend.KVCompressEndpoint(server.url, rate=0.5))
    assert "kv_compress.rate must be" in str(state.error())
