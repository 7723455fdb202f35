"""Prompts, and questions to a server."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from bench.common.server import Server

WORDS = (
    "the a of and to in is was for on that with as it at by from his her an be are "
    "this which or had not have one two when who all other time first new more some "
    "said day house water light field small great under over river stone green letter"
)
"""With a blank before it each is a token of nearly every vocabulary."""
RATE = 4


@dataclass(frozen=True)
class Sizes:
    """Lengths of prompts and answers, in tokens."""

    short: int
    middle: int
    beyond: int
    """More than the pool holds."""
    output: int = 32

    @classmethod
    def of(cls, pool: int, context: int) -> Sizes:
        """For a pool of so many tokens: a quarter, less than half, half as much again.

        Half the pool is what makes a prompt be compressed between its chunks.
        """
        most = context - 2 * cls.output - 64
        return cls(
            short=min(pool // 4, most),
            middle=min(pool * 9 // 20, most),
            beyond=min(pool * 3 // 2, most),
        )


@dataclass
class Reply:
    """What came back, of one answer.

    Parameters
    ----------
    text : str
    ids : list of int
        Of ``/generate`` alone, as `tops`: the likeliest tokens at each of them.
    cached, prompt : int
        Tokens of the prompt: found in the prefix cache, and all.
    kv : dict
        The summary of compression.
    finish : str
    reasoning : str
        Of a chat, as `tools`: pairs of name and arguments.
    events : int
        Of a stream.
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    tops: list[frozenset[int]] = field(default_factory=list)
    cached: int = 0
    prompt: int = 0
    kv: dict[str, Any] = field(default_factory=dict)
    finish: str = ""
    reasoning: str = ""
    tools: list[tuple[str, str]] = field(default_factory=list)
    events: int = 0


class Asker:
    """Asks one server.

    Parameters
    ----------
    server : Server
    sizes : Sizes
    seed : int
        Of the prompts; no two are the same.
    wait : float
        Seconds that an answer may take.
    stock : bool
        SGLang as it comes: whatever rate is named, nothing of ours is asked for.
    """

    def __init__(
        self,
        server: Server,
        sizes: Sizes,
        seed: int,
        wait: float,
        *,
        stock: bool = False,
    ) -> None:
        self.server, self.sizes, self.wait, self.stock = server, sizes, wait, stock
        self._draw = random.Random(seed)

    def text(self, tokens: int) -> str:
        """Random words, about so many tokens."""
        return " ".join(self._draw.choices(WORDS.split(), k=tokens))

    def generate(
        self,
        text: str,
        *,
        rate: float | None = RATE,
        adapter: str | None = None,
        tops: int = 0,
        **params: Any,
    ) -> Reply:
        """Ask ``/generate``; `rate` None: keep everything."""
        body: dict[str, Any] = {
            "text": text,
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": self.sizes.output,
                **self._custom(rate),
                **params,
            },
        }
        if adapter is not None:
            body["lora_path"] = adapter
        if tops:
            body |= {"return_logprob": True, "top_logprobs_num": tops}
        return read_native(self._post("/generate", body))

    def generate_all(self, questions: Sequence[dict[str, Any]]) -> list[Reply]:
        """Ask all at once."""
        with ThreadPoolExecutor(len(questions)) as threads:
            asked = [threads.submit(self.generate, **one) for one in questions]
            return [one.result() for one in asked]

    def chat(self, text: str, *, stream: bool = False, **fields: Any) -> Reply:
        """Ask ``/v1/chat/completions`` at rate `RATE`.

        Without ``enable_thinking: false`` a server with a reasoning parser takes every
        answer for a thought, and constrains only what comes behind it.
        """
        body: dict[str, Any] = {
            "model": "default",
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": 8 * self.sizes.output,
            **self._custom(RATE),
            "chat_template_kwargs": {"enable_thinking": False},
            **fields,
        }
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        said = self._post("/v1/chat/completions", body)
        return read_stream(said) if stream else read_chat([said])

    def _custom(self, rate: float | None) -> dict[str, Any]:
        return {} if self.stock else {"custom_params": custom(rate)}

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self.server.get(path, self.wait, json.dumps(body).encode())


def custom(rate: float | None) -> dict[str, Any]:
    """Custom parameters that ask for a rate; None: keep everything."""
    return {"kv_compress": {"enabled": False} if rate is None else {"rate": rate}}


def read_native(said: dict[str, Any]) -> Reply:
    """Read an answer of ``/generate``."""
    info = said["meta_info"]
    return Reply(
        text=said["text"],
        ids=list(said.get("output_ids") or ()),
        tops=[
            frozenset(token for _, token, *_ in step)
            for step in info.get("output_top_logprobs") or ()
        ],
        cached=info["cached_tokens"],
        prompt=info["prompt_tokens"],
        kv=info.get("kv_compress") or {},
        finish=info["finish_reason"]["type"],
    )


def read_stream(said: str) -> Reply:
    """Read the events of a chat's stream."""
    lines = [line.removeprefix("data: ") for line in said.splitlines() if line]
    return read_chat([json.loads(line) for line in lines if line != "[DONE]"])


def read_chat(events: Sequence[dict[str, Any]]) -> Reply:
    """Join the events of a chat; one that is no stream has a single one.

    Raises
    ------
    ValueError
        If the server reports an error behind a status of 200.
    """
    reply = Reply(events=len(events))
    calls: dict[int, list[str]] = {}
    for event in events:
        if event.get("error") or event.get("object") == "error":
            raise ValueError(f"the server says {json.dumps(event)}")
        reply.prompt = (event.get("usage") or {}).get("prompt_tokens") or reply.prompt
        for kv in (event.get("metadata") or {}).get("kv_compress") or ():
            reply.kv = kv
        for choice in event.get("choices") or ():
            part = choice.get("delta") or choice.get("message") or {}
            reply.text += part.get("content") or ""
            reply.reasoning += part.get("reasoning_content") or ""
            reply.finish = choice.get("finish_reason") or reply.finish
            for place, call in enumerate(part.get("tool_calls") or ()):
                index = call.get("index")
                names = calls.setdefault(place if index is None else index, ["", ""])
                names[0] += call["function"].get("name") or ""
                names[1] += call["function"].get("arguments") or ""
    reply.tools = [(name, arguments) for name, arguments in calls.values()]
    return reply
