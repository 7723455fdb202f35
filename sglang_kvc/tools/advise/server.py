"""The few routes of a running server that are used."""

from __future__ import annotations

from typing import Any

from sglang_kvc.tools.advise.prompts import Prompt
from sglang_kvc.tools.server_http import ANSWER_S, Http, RefusedError, ServerError
from sglang_kvc.tools.token_ids import token_ids

__all__ = ["Server", "ServerError"]


class Server(Http):
    """A server of SGLang with ``--kv-compress``."""

    def info(self) -> dict[str, Any]:
        """What the server says of itself; raises ServerError if nobody answers."""
        return self.json("/server_info")

    def tokens_of(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; a chat goes through the model's template."""
        return token_ids(self, prompt.prompt or prompt.messages or "")

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer a request through ``/generate``.

        Raises
        ------
        ServerError
            If it is refused, or ended before its time.
        """
        answer = self.json("/generate", body, ANSWER_S)
        reason = answer["meta_info"].get("finish_reason") or {}
        if reason.get("type") == "abort":
            raise RefusedError(str(reason.get("message", reason)))
        return answer
