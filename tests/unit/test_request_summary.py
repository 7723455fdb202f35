"""The summary in the metadata of an OpenAI answer, streamed and not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionResponse,
    ChatCompletionStreamResponse,
    CompletionResponse,
    CompletionStreamResponse,
    ResponsesResponse,
    UsageInfo,
)
from starlette.responses import JSONResponse, StreamingResponse

from sglang_kvc.requests.answer_summary import answer_with_summary

USAGE = UsageInfo(prompt_tokens=1, total_tokens=2, completion_tokens=1)
TRAP = '"choices":[] "usage":{ "choices":[]'


def out(rate: int | None, **more: Any) -> dict[str, Any]:
    """One choice as SGLang's TokenizerManager answers it."""
    info = {} if rate is None else {"kv_compress": {"rate": rate}}
    return {"text": "x", "meta_info": info, **more}


def serving(*outs: Any) -> Any:
    """A serving object whose manager answers with `outs`."""

    async def generate_request(obj: Any, request: Any = None) -> AsyncIterator[Any]:
        assert (obj, request) == ("obj", "raw")
        for it in outs:
            yield it

    manager = SimpleNamespace(generate_request=generate_request, other=7)
    return SimpleNamespace(tokenizer_manager=manager)


def answer(stock: Any, made: Any) -> Any:
    """Answer of SGLang's `made` through our hook; then `stock` is as before."""
    before = stock.tokenizer_manager

    async def answering(self: Any, request: Any, raw_request: Any) -> Any:
        assert self.tokenizer_manager.other == 7
        outs = self.tokenizer_manager.generate_request("obj", raw_request)
        return await made(outs, request)

    async def all_of_it() -> Any:
        response = await answer_with_summary(answering, stock, "request", "raw")
        if isinstance(response, StreamingResponse):
            return [chunk async for chunk in response.body_iterator]
        # As SGLang's route asks.
        if isinstance(response, AsyncGenerator):
            return [chunk async for chunk in response]
        return response

    found = asyncio.run(all_of_it())
    assert stock.tokenizer_manager is before
    return found


@pytest.mark.parametrize("kind", [ChatCompletionResponse, CompletionResponse])
@pytest.mark.parametrize("metadata", [None, {"weight_version": "7"}])
def test_whole(kind: Any, metadata: Any) -> None:
    """The metadata of SGLang's own stays."""

    async def made(outs: Any, request: Any) -> Any:
        assert request == "request"
        await outs.__anext__()
        return kind(id="a", model="m", choices=[], usage=USAGE, metadata=metadata)

    for outs, told in ((out(8), [8]), ([out(8), out(4)], [8, 4])):
        summaries = [{"rate": rate} for rate in told]
        expected = {**(metadata or {}), "kv_compress": summaries}
        assert answer(serving(outs), made).model_dump()["metadata"] == expected
    assert answer(serving(out(None)), made).metadata == metadata


@pytest.mark.parametrize(
    ("kind", "written"),
    [
        (ChatCompletionStreamResponse, {}),
        (CompletionStreamResponse, {"exclude_none": True}),
    ],
)
@pytest.mark.parametrize("asked", [True, False])
def test_streamed(kind: Any, written: dict[str, bool], asked: bool) -> None:
    """In the chunk with the usage, or nowhere; all other chunks are as they were."""

    def chunk(**fields: Any) -> str:
        made = kind(id="a", created=1, model="m", choices=[], **fields)
        return f"data: {made.model_dump_json(**written)}\n\n"

    texts = [f"data: {json.dumps({'text': TRAP})}\n\n", chunk()]
    usage = chunk(usage=USAGE)

    async def made(outs: Any, request: Any) -> Any:
        async def chunks() -> AsyncIterator[str]:
            async for _ in outs:
                yield texts[0]
            yield texts[1]
            if asked:
                yield usage
            yield "data: [DONE]\n\n"

        return StreamingResponse(chunks())

    outs = [out(1, index=1), out(2, index=0), out(3, index=1)]
    *others, last, done = answer(serving(*outs), made)
    assert done == "data: [DONE]\n\n"
    if not asked:
        assert [*others, last] == [texts[0]] * 3 + [texts[1]]
        return
    assert others == [texts[0]] * 3 + [texts[1]]
    assert last.startswith("data: {") and last.endswith("}\n\n")
    before, after = (json.loads(it.removeprefix("data: ")) for it in (usage, last))
    assert after.pop("metadata") == {"kv_compress": [{"rate": 2}, {"rate": 3}]}
    assert after == before


def response_of(request_metadata: dict[str, Any]) -> ResponsesResponse:
    """An answer of /v1/responses, which repeats the request's metadata."""
    return ResponsesResponse(model="m", status="completed", metadata=request_metadata)


def test_whole_response() -> None:
    """The client's own entries stay; its wish gives way to what came of it."""

    async def made(outs: Any, request: Any) -> Any:
        await outs.__anext__()
        return response_of({"kv_compress": "rate=8", "mine": "7"})

    told = answer(serving(out(8)), made).metadata
    assert told == {"kv_compress": [{"rate": 8}], "mine": "7"}


@pytest.mark.parametrize("end", ["completed", "incomplete"])
def test_streamed_response(end: str) -> None:
    """SGLang answers with the stream itself; only its last event is written anew."""
    trap = f"event: response.{end}\ndata: " + TRAP

    def event(kind: str, **fields: Any) -> str:
        payload = json.dumps({"type": kind, **fields})
        return f"event: {kind}\ndata: {payload}\n\n"

    whole = json.loads(response_of({"mine": "7"}).model_dump_json())
    last = event(f"response.{end}", sequence_number=3, response=whole)

    async def made(outs: Any, request: Any) -> Any:
        async def chunks() -> AsyncIterator[str]:
            yield event("response.created", response=whole)
            async for _ in outs:
                yield event("response.output_text.delta", delta=trap)
            yield last

        return chunks()

    created, *deltas, told = answer(serving(out(1), out(2)), made)
    assert created == event("response.created", response=whole)
    assert deltas == [event("response.output_text.delta", delta=trap)] * 2
    head, data = told.split("data: ")
    assert head == f"event: response.{end}\n" and data.endswith("}\n\n")
    before, after = (json.loads(it.partition("data: ")[2]) for it in (last, told))
    expected = {"mine": "7", "kv_compress": [{"rate": 2}]}
    assert after["response"].pop("metadata") == expected
    del before["response"]["metadata"]
    assert after == before


def test_nothing_to_tell() -> None:
    """A refusal, or a stream without a summary, is what SGLang makes of it."""
    refusal = JSONResponse({"error": 1})

    async def refused(outs: Any, request: Any) -> Any:
        return refusal

    assert answer(serving(), refused) is refusal

    async def streamed(outs: Any, request: Any) -> Any:
        async def chunks() -> AsyncIterator[Any]:
            async for _ in outs:
                yield 'data: {"choices":[],"usage":{}}\n\n'
            yield b"bytes"

        return StreamingResponse(chunks())

    found = answer(serving(out(None)), streamed)
    assert found == ['data: {"choices":[],"usage":{}}\n\n', b"bytes"]
