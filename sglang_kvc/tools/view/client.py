"""What a server says of a prompt: its tokens, answers, and what it held for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sglang_kvc.tools.server_http import Http, RefusedError, ServerError, reason_of
from sglang_kvc.tools.token_ids import token_ids
from sglang_kvc.tools.view.texts import spell

SWITCH = "kv_compress"


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


class Client(Http):
    """A server of SGLang with ``--kv-compress``."""

    def model(self) -> str:
        """Path or name of its model. Raises `ServerError` if nobody answers."""
        try:
            info = self.json("/model_info")
        except RefusedError as error:
            raise ServerError(f"{self.url} is no SGLang server: {error}") from None
        return str(info.get("model_path", "?"))

    def tokens(self, prompt: str) -> tuple[list[int], list[str]]:
        """Ids of a prompt's tokens, and the text of each; together it is the prompt."""
        ids = token_ids(self, prompt)
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
        ServerError : the server does not compress, or is gone.
        """
        how = {"enabled": False} if rate is None else {"rate": rate}
        asked = {**how, "report_heads": True, "report_tokens": True}
        params = {"temperature": 0, "max_new_tokens": max_new_tokens}
        custom = {"custom_params": {SWITCH: asked}}
        body = {"input_ids": ids, "sampling_params": {**params, **custom}}
        answer = Answer(rate)
        for event in self.events("/generate", {**body, "stream": True}):
            _take(answer, event)
            on_token(len(answer.token_ids))
        if not answer.shares:
            raise ServerError(
                "the answer broke off before its end; is the server well?"
            )
        return answer

    def _decode(self, groups: list[list[int]]) -> list[str]:
        body = {"tokens": groups, "skip_special_tokens": False}
        texts: list[str] = self.json("/detokenize", body)["text"]
        return texts


def _take(answer: Answer, event: dict[str, Any]) -> None:
    """Add an event of a stream to an answer."""
    if "error" in event:
        raise RefusedError(reason_of(json.dumps(event).encode()))
    info = event["meta_info"]
    finish = info.get("finish_reason") or {}
    if finish.get("type") == "abort":
        raise RefusedError(finish.get("message") or "the request was aborted")
    summary = info.get(SWITCH)
    if not isinstance(summary, dict):
        raise ServerError(
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
