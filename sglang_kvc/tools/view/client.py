"""What a server says of a prompt: its tokens, answers, and what it held for them."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sglang_kvc.errors import KVCError
from sglang_kvc.tools.view.texts import spell

SWITCH = "kv_compress"
SHORT_S, ANSWER_S = 120, 3600


class ViewError(KVCError):
    """Something that the user of the tool can put right, said in one line."""


class RefusedError(ViewError):
    """The server has answered with an error."""


@dataclass
class Answer:
    """One answer, and what was held while it was written.

    Attributes
    ----------
    rate : what was asked for; None keeps everything.
    text, token_ids : the answer.
    steps : tokens of the answer whenever the server told of it.
    logical, resident : tokens of the request by then, and those held per head on
        average.
    summary : the last ``meta_info["kv_compress"]``.
    refused : why there is no answer.
    """

    rate: float | None
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    logical: list[int] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    refused: str = ""

    @property
    def name(self) -> str:
        """What it is called on the page."""
        return "Full cache" if self.rate is None else f"Rate {self.rate:g}"

    @property
    def shares(self) -> list[float]:
        """Of each prompt token, the share of heads that hold it at the end."""
        shares: list[float] = self.summary.get("prompt_token_shares", [])
        return shares


@dataclass(frozen=True)
class Client:
    """A server at `url`; with `api_key` if it wants one."""

    url: str
    api_key: str | None = None

    def model(self) -> str:
        """Path or name of its model. Raises `ViewError` if nobody answers."""
        try:
            info = self._json("/model_info")
        except RefusedError as error:
            raise ViewError(f"{self.url} is no SGLang server: {error}") from None
        return str(info.get("model_path", "?"))

    def tokens(self, prompt: str) -> tuple[list[int], list[str]]:
        """Ids of a prompt's tokens, and the text of each; together it is the prompt."""
        ids = self._json("/tokenize", {"prompt": prompt}).get("tokens")
        if not ids:
            raise ViewError("the server made no tokens of the prompt")
        return ids, spell(prompt, ids, self._decode)

    def answer(
        self,
        ids: list[int],
        rate: float | None,
        max_new_tokens: int,
        on_token: Callable[[int], None],
    ) -> Answer:
        """Let the server write an answer, without chance.

        Parameters
        ----------
        ids : the prompt.
        rate : how far to compress it; None: not at all.
        max_new_tokens : of the answer.
        on_token : called with the tokens so far, as they come.

        Raises
        ------
        RefusedError : the server does not serve it.
        ViewError : the server does not compress, or is gone.
        """
        how = {"enabled": False} if rate is None else {"rate": rate}
        asked = {**how, "report_heads": True, "report_tokens": True}
        params = {"temperature": 0, "max_new_tokens": max_new_tokens}
        custom = {"custom_params": {SWITCH: asked}}
        body = {"input_ids": ids, "sampling_params": {**params, **custom}}
        answer = Answer(rate)
        for event in self._events("/generate", {**body, "stream": True}):
            _take(answer, event)
            on_token(len(answer.token_ids))
        if not answer.shares:
            raise ViewError("the answer broke off before its end; is the server well?")
        return answer

    def _decode(self, groups: list[list[int]]) -> list[str]:
        body = {"tokens": groups, "skip_special_tokens": False}
        texts: list[str] = self._json("/detokenize", body)["text"]
        return texts

    def _json(self, path: str, body: Any = None) -> dict[str, Any]:
        with self._open(path, body, SHORT_S) as response:
            try:
                found = json.load(response)
            except ValueError:
                found = None
        if not isinstance(found, dict):
            raise RefusedError(f"no JSON object came from {path}")
        return found

    def _events(self, path: str, body: Any) -> Iterator[dict[str, Any]]:
        with self._open(path, body, ANSWER_S) as response:
            try:
                for line in response:
                    data = line.strip().removeprefix(b"data: ")
                    if data and data != b"[DONE]":
                        yield json.loads(data)
            except (OSError, ValueError) as error:
                raise ViewError(
                    f"the answer of {self.url} broke off: {error}"
                ) from None

    def _open(self, path: str, body: Any, timeout: float) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(f"{self.url}{path}", data, headers)
            return urllib.request.urlopen(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            raise RefusedError(_reason(error.read(), f"HTTP {error.code}")) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ViewError(f"no server answers at {self.url}: {reason}") from None


def _take(answer: Answer, event: dict[str, Any]) -> None:
    """Add an event of a stream to an answer."""
    if "error" in event:
        raise RefusedError(_reason(json.dumps(event).encode(), "error"))
    info = event["meta_info"]
    finish = info.get("finish_reason") or {}
    if finish.get("type") == "abort":
        raise RefusedError(finish.get("message") or "the request was aborted")
    summary = info.get(SWITCH)
    if not isinstance(summary, dict):
        raise ViewError(
            "the server runs without --kv-compress, or an old version of it"
        )
    ids, text = event["output_ids"], event.get("text") or ""
    if len(ids) < info["completion_tokens"]:
        # A server with --incremental-streaming-output sends what is new.
        ids, text = [*answer.token_ids, *ids], answer.text + text
    answer.token_ids, answer.text, answer.summary = ids, text, summary
    answer.steps.append(info["completion_tokens"])
    answer.logical.append(summary["logical_tokens"])
    answer.resident.append(summary["resident_tokens"])


def _reason(body: bytes, otherwise: str) -> str:
    """Message in the body of an error."""
    try:
        found = json.loads(body)
        found = found.get("error", found)
        return str(found.get("message", found) if isinstance(found, dict) else found)
    except (ValueError, AttributeError):
        return f"{otherwise}: {body[:200].decode(errors='replace')}"
