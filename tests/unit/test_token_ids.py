"""Token ids of prompts, also where a server's tokenize route fails; no real server."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sglang_kvc.tools.advise.__main__ import main as advise
from sglang_kvc.tools.server_http import Http, RefusedError, ServerError
from sglang_kvc.tools.token_ids import TOKENIZE, token_ids
from sglang_kvc.tools.view.__main__ import main as view

CHAT = [{"role": "user", "content": "Hi"}]
WHOLE = {"kv_compress": {"enabled": False}}
START = 1
"""Id of the token that the tokenizer puts before a text."""
NO_LENGTH = (500, {"message": "Integer exceeds 64-bit range"})
Reply = tuple[int, dict[str, Any]]


def ids_of(text: str) -> list[int]:
    return [START, *map(ord, text)]


class Server(ThreadingHTTPServer):
    """Answers as SGLang does, but on routes that `says` has a reply for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.says: dict[str, Reply] = {}
        self.asked: list[tuple[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    def do_GET(self) -> None:
        self._reply(None)

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self._reply(json.loads(self.rfile.read(length)))

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def _reply(self, body: Any) -> None:
        server: Server = self.server  # type: ignore[assignment]
        server.asked.append((self.path, body))
        # Only those that ask for ids: answers are served.
        asks = body is None or "input_ids" not in body
        status, answer = (asks and server.says.get(self.path)) or (
            200,
            ROUTES[self.path](body),
        )
        self.send_response(status)
        self.end_headers()
        before = b"data: " if body and body.get("stream") else b""
        self.wfile.write(before + json.dumps(answer).encode() + b"\n\n")


def tokenize(body: dict[str, Any]) -> dict[str, Any]:
    return {"tokens": ids_of(body.get("prompt") or "chat")}


def detokenize(body: dict[str, Any]) -> dict[str, Any]:
    groups = body["tokens"]
    texts = [
        "".join("<s>" if it == START else chr(it) for it in group) for group in groups
    ]
    return {"text": texts}


def chat(body: dict[str, Any]) -> dict[str, Any]:
    choice = {"message": {"content": "a"}}
    if body.get("return_prompt_token_ids"):
        choice["prompt_token_ids"] = ids_of("chat")  # type: ignore[assignment]
    return {"choices": [choice]}


def generate(body: dict[str, Any]) -> dict[str, Any]:
    ids = body.get("input_ids") or ids_of(body["text"])
    kv = body["sampling_params"]["custom_params"]["kv_compress"]
    held = len(ids) // kv.get("rate", 1)
    summary = {
        **{"logical_tokens": len(ids), "resident_tokens": held, "deferred_passes": 0},
        **{"peak_resident_tokens": held, "budget_tokens": held, "passes": 1},
        **{"prompt_token_shares": [1.0] * len(ids), "num_layers": 1},
        "packed_tokens_per_head": [held],
    }
    meta = {
        **{"kv_compress": summary, "completion_tokens": 1},
        "output_token_logprobs": [[-1.0, 97, None]],
        "output_top_logprobs": [[[-1.0, 97, None]]],
    }
    told = {"prompt_token_ids": ids} if body.get("return_prompt_token_ids") else {}
    return {"text": "a", "output_ids": [97], "meta_info": meta, **told}


ROUTES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "/server_info": lambda _: {"model_path": "/models/m"},
    "/model_info": lambda _: {"model_path": "/models/m"},
    TOKENIZE: tokenize,
    "/detokenize": detokenize,
    "/generate": generate,
    "/v1/chat/completions": chat,
}


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as played:
        threading.Thread(target=played.serve_forever, args=(0.01,), daemon=True).start()
        yield played
        played.shutdown()


# The ids ------------------------------------------------------------------------------


def test_the_tokenize_route_is_enough(server: Server) -> None:
    assert token_ids(Http(server.url), "Hi") == ids_of("Hi")
    assert token_ids(Http(server.url), CHAT) == ids_of("chat")
    assert server.asked == [
        (TOKENIZE, {"prompt": "Hi"}),
        (TOKENIZE, {"messages": CHAT}),
    ]


@pytest.mark.parametrize("status", [500, 503])
def test_a_text_is_answered_with_one_token(server: Server, status: int) -> None:
    server.says[TOKENIZE] = (status, {})
    assert token_ids(Http(server.url), "Hi") == ids_of("Hi")
    params = {"temperature": 0, "max_new_tokens": 1, "custom_params": WHOLE}
    body = {"text": "Hi", "sampling_params": params, "return_prompt_token_ids": True}
    assert server.asked[1:] == [("/generate", body)]


def test_a_chat_goes_through_its_template(server: Server) -> None:
    server.says[TOKENIZE] = NO_LENGTH
    assert token_ids(Http(server.url), CHAT) == ids_of("chat")
    params = {"temperature": 0, "max_tokens": 1, "custom_params": WHOLE}
    body = {"messages": CHAT, **params, "return_prompt_token_ids": True}
    assert server.asked[1:] == [("/v1/chat/completions", body)]


def test_a_refusal_is_not_asked_about_again(server: Server) -> None:
    server.says[TOKENIZE] = (400, {"message": "no such template"})
    with pytest.raises(RefusedError, match="HTTP 400: no such template"):
        token_ids(Http(server.url), CHAT)
    assert len(server.asked) == 1


def test_no_tokens_are_an_error(server: Server) -> None:
    server.says[TOKENIZE] = (200, {"tokens": []})
    with pytest.raises(ServerError, match="made no tokens of the prompt"):
        token_ids(Http(server.url), "Hi")


@pytest.mark.parametrize(
    ("reply", "came"),
    [
        ((400, {"message": "too long"}), "HTTP 400: too long"),
        ((500, {"message": "gone"}), "HTTP 500: gone"),
        ((200, {"text": "a"}), "an answer without them"),
        ((200, {"prompt_token_ids": []}), "an answer without them"),
        ((200, {"prompt_token_ids": ["a"]}), "an answer without them"),
        ((200, {"choices": ["a"]}), "an answer without them"),
    ],
)
def test_if_both_ways_fail_it_says_what_to_do(
    server: Server, reply: Reply, came: str
) -> None:
    server.says = {TOKENIZE: NO_LENGTH, "/generate": reply}
    with pytest.raises(ServerError) as error:
        token_ids(Http(server.url), "Hi")
    said = str(error.value)
    assert "a list of them was expected" in said
    assert f"{TOKENIZE}: HTTP 500: Integer exceeds" in said
    assert f"/generate: {came}. " in said
    assert 'Give the model\'s tokenizer_config.json a "model_max_length"' in said


# The tools ----------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "Hello"}, {"messages": CHAT}, {"prompt": "Bye"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_advise_runs_to_its_end(
    server: Server, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.says[TOKENIZE] = NO_LENGTH
    words = ["--url", server.url, "--prompts", str(prompts), "--rates", "2", "--json"]
    assert advise(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompts"], found["left_out"]) == (3, [])
    sent = {
        tuple(body["input_ids"])
        for _, body in server.asked
        if "input_ids" in (body or ())
    }
    assert sent == {tuple(ids_of(text)) for text in ("Hello", "chat", "Bye")}


def test_advise_says_what_to_do(
    server: Server, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.says = dict.fromkeys(
        (TOKENIZE, "/generate", "/v1/chat/completions"), NO_LENGTH
    )
    words = ["--url", server.url, "--prompts", str(prompts), "--concurrency", "1"]
    assert advise(words) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: no prompt was served: line 1: the server does not")
    assert "model_max_length" in said


def test_view_writes_its_page(server: Server, tmp_path: Path) -> None:
    server.says[TOKENIZE] = NO_LENGTH
    (tmp_path / "p.txt").write_text("Hello world")
    out = tmp_path / "view.html"
    words = ["--url", server.url, "--prompt", f"{tmp_path}/p.txt", "--out", str(out)]
    assert view([*words, "--rates", "2"]) == 0
    data = json.loads(re.findall(r'id="data">(.*?)</script>', out.read_text())[0])
    assert data["tokens"] == ["<s>", *"Hello", " ", *"world"]


def test_view_says_what_to_do(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.says = {TOKENIZE: NO_LENGTH, "/generate": (400, {"message": "too long"})}
    (tmp_path / "p.txt").write_text("Hello world")
    words = ["--url", server.url, "--prompt", f"{tmp_path}/p.txt"]
    assert view([*words, "--out", f"{tmp_path}/view.html"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("view: the server does not tell the token ids")
    assert "HTTP 400: too long" in said
