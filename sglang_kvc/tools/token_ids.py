"""Ask a server for the token ids of a prompt.

SGLang 0.5.17 answers ``/v1/tokenize`` with HTTP 500 if its tokenizer declares no
length: that is 10**30 then, more than its JSON may hold. So the ids can come with an
answer of one token, too.
"""

from __future__ import annotations

from typing import Any, TypeGuard

from sglang_kvc.tools.server_http import ANSWER_S, Http, RefusedError, ServerError

Chat = list[dict[str, Any]]

TOKENIZE = "/v1/tokenize"
_SERVER_FAILED = 500
"""From here on, a status is no fault of the request."""
_WITH_IDS = {"return_prompt_token_ids": True}
_WHOLE = {"custom_params": {"kv_compress": {"enabled": False}}}


def token_ids(server: Http, prompt: str | Chat) -> list[int]:
    """Token ids of a text, or of a chat through the model's template.

    Special tokens are among them, as they are when the server is sent the prompt.

    Raises
    ------
    RefusedError : by the server; for example, the template does not take the chat.
    ServerError : nobody answers, or neither way leads to ids.
    """
    name = "prompt" if isinstance(prompt, str) else "messages"
    try:
        found = server.json(TOKENIZE, {name: prompt}, ANSWER_S).get("tokens")
    except RefusedError as error:
        if error.status is None or error.status < _SERVER_FAILED:
            raise
        return _from_an_answer(server, prompt, f"{TOKENIZE}: {error}")
    if not _are_ids(found):
        raise ServerError(f"the server made no tokens of the prompt ({TOKENIZE})")
    return found


def _from_an_answer(server: Http, prompt: str | Chat, before: str) -> list[int]:
    """Ids that come beside an answer of one token.

    It costs a prefill, which the next request with this prompt finds in the prefix
    cache. The ids in log-probabilities would cost logits of the whole prompt.
    """
    path, body = _request(prompt)
    try:
        answer = server.json(path, body, ANSWER_S)
        found = _ids_in(answer)
        if _are_ids(found):
            return found
        came = "an answer without them"
    except RefusedError as error:
        came = str(error).rstrip(".")
    raise ServerError(
        "the server does not tell the token ids of the prompt: a list of them was "
        f"expected, but {before}; {path}: {came}. The server's log has the reason. "
        'Give the model\'s tokenizer_config.json a "model_max_length" if it has none, '
        "and start the server with a tokenizer"
    )


def _request(prompt: str | Chat) -> tuple[str, dict[str, Any]]:
    """A request of one token that answers with the ids of its prompt."""
    if isinstance(prompt, str):
        params = {"temperature": 0, "max_new_tokens": 1, **_WHOLE}
        return "/generate", {"text": prompt, "sampling_params": params, **_WITH_IDS}
    params = {"temperature": 0, "max_tokens": 1, **_WHOLE}
    return "/v1/chat/completions", {"messages": prompt, **params, **_WITH_IDS}


def _ids_in(answer: dict[str, Any]) -> Any:
    """Ids in an answer of either route: OpenAI's has them in its choice."""
    choices = answer.get("choices")
    holder = choices[0] if isinstance(choices, list) and choices else answer
    return holder.get("prompt_token_ids") if isinstance(holder, dict) else None


def _are_ids(found: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(found, list)
        and bool(found)
        and all(isinstance(one, int) for one in found)
    )
