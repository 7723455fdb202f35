"""The few routes of a running server that are used."""

from __future__ import annotations

import urllib.parse
from typing import Any

import requests

from sglang_kvc.errors import KVCError
from sglang_kvc.tools.advise.prompts import Prompt

_TIMEOUT_S = 3600
_LOCAL = ("127.0.0.1", "localhost", "::1")


class ServerError(KVCError, RuntimeError):
    """The server cannot be asked, or has refused a request."""


class Server:
    """A server of SGLang with ``--kv-compress``.

    Parameters
    ----------
    url : for example ``http://127.0.0.1:30000``.
    api_key : of a server that was started with one.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        local = urllib.parse.urlsplit(self.url).hostname in _LOCAL
        # A proxy meant for the outside world does not reach this machine.
        self._proxies = {"http": "", "https": ""} if local else None

    def info(self) -> dict[str, Any]:
        """What the server says of itself.

        Raises
        ------
        ServerError
            If nobody answers.
        """
        return self._answer("get", "/server_info", None)

    def tokens_of(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; a chat goes through the model's template."""
        given = (
            {"prompt": prompt.prompt}
            if prompt.messages is None
            else {"messages": prompt.messages}
        )
        tokens: list[int] = self._answer("post", "/v1/tokenize", given)["tokens"]
        return tokens

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer a request through ``/generate``.

        Raises
        ------
        ServerError
            If it is refused, or ended before its time.
        """
        answer = self._answer("post", "/generate", body)
        reason = answer["meta_info"].get("finish_reason") or {}
        if reason.get("type") == "abort":
            raise ServerError(str(reason.get("message", reason)))
        return answer

    def _answer(self, method: str, path: str, body: Any) -> Any:
        try:
            response = requests.request(
                method,
                f"{self.url}{path}",
                json=body,
                headers=self._headers,
                proxies=self._proxies,
                timeout=_TIMEOUT_S,
            )
        except requests.RequestException as error:
            raise ServerError(
                f"no answer from {self.url}: {type(error).__name__}. Is the server "
                "running there? Give its address with --url"
            ) from None
        if response.status_code != 200:
            raise ServerError(f"HTTP {response.status_code}: {_message(response)}")
        return response.json()


def _message(response: requests.Response) -> str:
    try:
        said = response.json()
    except ValueError:
        return response.text[:200]
    error = said.get("error", said) if isinstance(said, dict) else said
    text = error.get("message", error) if isinstance(error, dict) else error
    return str(text)[:500]
