"""``metadata["kv_compress"]`` of an OpenAI answer: one summary for every choice.

SGLang shows ``meta_info`` in a chat that is not streamed only, and only to those who
ask for it with a field that its gateway drops. ``metadata`` is a field of its answers
anyway. A streamed answer has it in the chunk with the usage, whose list of choices is
empty: clients that ask for that chunk (``stream_options``) expect one without text. A
stream of ``/v1/responses`` has it in its last event, which repeats the whole answer.
"""

from __future__ import annotations

import copy
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

from sglang_kvc.config.options import SWITCH

_DATA = "data: "
# Of the text of an answer every quotation mark is escaped.
_USAGE_CHUNK = ('"choices":[]', '"usage":{')
_LAST_EVENTS = ("event: response.completed\n", "event: response.incomplete\n")


async def answer_with_summary(
    answering: Callable[..., Awaitable[Any]],
    serving: Any,
    request: Any,
    raw_request: Any,
) -> Any:
    """Answer a request of the OpenAI API; add what was kept.

    Parameters
    ----------
    answering : callable
        SGLang's ``OpenAIServingBase.handle_request``, or ``create_responses`` of
        ``OpenAIServingResponses``, which streams without an HTTP response around it.
    serving : OpenAIServingBase
        Of a chat, of completions or of responses. Others' answers have no such field.
    request, raw_request : as SGLang gives them.
    """
    # A request has a serving object of its own, which looks on; the parts are shared.
    heard = Listener(serving.tokenizer_manager)
    serving = copy.copy(serving)
    serving.tokenizer_manager = heard
    answer = await answering(serving, request, raw_request)
    if isinstance(answer, AsyncGenerator):
        return _with_summary(answer, heard)
    if hasattr(answer, "body_iterator"):
        answer.body_iterator = _with_summary(answer.body_iterator, heard)
    elif hasattr(answer, "metadata") and heard.summaries:
        answer.metadata = {**(answer.metadata or {}), SWITCH: heard.in_order()}
    return answer


class Listener:
    """A TokenizerManager that keeps the newest summary of every choice.

    Parameters
    ----------
    manager : sglang.srt.managers.tokenizer_manager.TokenizerManager
    """

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self.summaries: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    async def generate_request(
        self, obj: Any, request: Any = None
    ) -> AsyncIterator[Any]:
        """What the manager answers: one choice a time, or a list of all."""
        async for out in self._manager.generate_request(obj, request):
            choices = out if isinstance(out, list) else [out]
            for place, choice in enumerate(choices):
                summary = choice.get("meta_info", {}).get(SWITCH)
                if summary is not None:
                    self.summaries[choice.get("index", place)] = summary
            yield out

    def in_order(self) -> list[Any]:
        """Summaries as the answer lists its choices; None for one without."""
        return [self.summaries.get(place) for place in range(max(self.summaries) + 1)]


async def _with_summary(
    chunks: AsyncIterator[Any], heard: Listener
) -> AsyncGenerator[Any]:
    async for chunk in chunks:
        if isinstance(chunk, str) and heard.summaries:
            chunk = _told(chunk, heard.in_order())
        yield chunk


def _told(chunk: str, summaries: list[Any]) -> str:
    """The chunk, with the summaries if it is the one for them."""
    event, _, data = chunk.partition(_DATA)
    if event in _LAST_EVENTS:
        last = json.loads(data)
        response = last["response"]
        response["metadata"] = {**(response.get("metadata") or {}), SWITCH: summaries}
    elif not event and all(it in data for it in _USAGE_CHUNK):
        last = json.loads(data)
        last["metadata"] = {SWITCH: summaries}
    else:
        return chunk
    return f"{event}{_DATA}{json.dumps(last, separators=(',', ':'))}\n\n"
