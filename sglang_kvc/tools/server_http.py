"""Ask a running server over HTTP; what goes wrong is said in one line."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sglang_kvc.errors import KVCError

SHORT_S, ANSWER_S = 120, 3600
_LOCAL = ("127.0.0.1", "localhost", "::1")
_REASON_CHARS = 500


class ServerError(KVCError, RuntimeError):
    """The server cannot be asked, or has not answered as it should."""


class RefusedError(ServerError):
    """The server has answered with an error.

    Attributes
    ----------
    status : of HTTP; None if the error is in what came with a good one.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Http:
    """A server at `url`, for example ``http://127.0.0.1:30000``.

    Parameters
    ----------
    api_key : of a server that was started with one.
    """

    url: str
    api_key: str | None = None

    def json(
        self, path: str, body: Any = None, timeout: float = SHORT_S
    ) -> dict[str, Any]:
        """Answer to a GET, or with a `body` to a POST.

        Raises
        ------
        RefusedError : by the server, or the answer is no JSON object.
        ServerError : nobody answers.
        """
        with self._open(path, body, timeout) as response:
            try:
                found = json.load(response)
            except (OSError, ValueError, http.client.HTTPException):
                found = None
        if not isinstance(found, dict):
            raise RefusedError(f"no JSON object came from {path}")
        return found

    def events(self, path: str, body: Any) -> Iterator[dict[str, Any]]:
        """Events of a streamed answer as they come; raises as `json` does."""
        with self._open(path, body, ANSWER_S) as response:
            try:
                for line in response:
                    data = line.strip().removeprefix(b"data: ")
                    if data and data != b"[DONE]":
                        yield json.loads(data)
            except (OSError, ValueError, http.client.HTTPException) as error:
                raise ServerError(
                    f"the answer of {self.url} broke off: {error}"
                ) from None

    def _open(self, path: str, body: Any, timeout: float) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            address = f"{self.url.rstrip('/')}{path}"
            request = urllib.request.Request(address, data, headers)
            return self._opener().open(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            said = reason_of(error.read())
            raise RefusedError(f"HTTP {error.code}: {said}", error.code) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ServerError(
                f"no server answers at {self.url}: {reason}. Is the server running "
                "there? Give its address with --url"
            ) from None

    def _opener(self) -> urllib.request.OpenerDirector:
        # A proxy meant for the outside world does not reach this machine.
        local = urllib.parse.urlsplit(self.url).hostname in _LOCAL
        proxies = [urllib.request.ProxyHandler({})] if local else []
        return urllib.request.build_opener(*proxies)


def reason_of(body: bytes) -> str:
    """Message in the body of an error."""
    try:
        found = json.loads(body)
        found = found.get("error", found)
        text = found.get("message", found) if isinstance(found, dict) else found
    except (ValueError, AttributeError):
        text = body.decode(errors="replace")
    return str(text)[:_REASON_CHARS]
