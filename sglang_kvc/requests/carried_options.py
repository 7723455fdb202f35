"""Options of a request that do not come in its ``sampling_params``.

A gateway forwards the fields that it knows. SGLang's drops ``custom_params`` of
``/generate`` and of a chat, so the same options may stand in OpenAI's ``metadata`` and
in SGLang's ``custom_labels``, whose values are strings::

    {"metadata": {"kv_compress": "rate=8"}}
    {"metadata": {"kv_compress": "budget=1024, report_heads=true"}}
    {"custom_labels": {"kv_compress": "{\\"enabled\\": false}"}}

The first one of ``custom_params``, ``metadata`` and ``custom_labels`` that is given
holds, as a whole. All are checked: what is wrong is refused even where another holds.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any, TypeGuard

from sglang_kvc.config.options import SWITCH, KVCompressOptions
from sglang_kvc.config.shown import shown
from sglang_kvc.errors import ConfigError
from sglang_kvc.requests.request_names import check_name
from sglang_kvc.requests.request_options import parse_options

MAX_TEXT = 256
"""Characters of options as a string; all nine keys take fewer than 180."""

_CUSTOM = "custom_params"
_LABELS = "custom_labels"
_FIELDS = ("metadata", _LABELS)
_EXAMPLE = f'for example {{"{SWITCH}": "rate=8"}}'


def carry_options(
    request: Any, body: Mapping[str, Any], defaults: KVCompressOptions
) -> None:
    """Put options that came elsewhere to where SGLang takes them to the scheduler.

    Parameters
    ----------
    request : sglang.srt.managers.io_struct.GenerateReqInput
        As it arrived. Its ``sampling_params`` are replaced by others, and our label is
        taken away: SGLang would count it among those of its metrics.
    body : Mapping
        The JSON that was sent; of the OpenAI API SGLang's request lacks both fields.
    defaults : KVCompressOptions
        The server's settings.

    Raises
    ------
    ConfigError
        With a message meant for the sender of the request.
    """
    given = {name: body.get(name) for name in _FIELDS}
    labels = request.custom_labels
    if _has_options(labels):
        given[_LABELS] = labels
        rest = {name: value for name, value in labels.items() if name != SWITCH}
        request.custom_labels = rest or None
    asked = [
        _read(fields[SWITCH], f"{name}[{SWITCH!r}]", defaults)
        for name, fields in given.items()
        if _has_options(fields)
    ]
    if asked:
        params = request.sampling_params
        several = isinstance(params, list)
        carried = [_with(each, asked[0]) for each in (params if several else [params])]
        request.sampling_params = carried if several else carried[0]


def body_of(http_request: Any) -> Mapping[str, Any]:
    """Return the JSON object that an HTTP request has brought, or an empty one.

    Parameters
    ----------
    http_request : starlette.requests.Request or other
        FastAPI has read its body, and it keeps what was parsed. Of the Engine or of
        gRPC there is none.
    """
    from starlette.requests import Request

    if not isinstance(http_request, Request):
        return {}
    # A coroutine that need not wait ends at its first step. One that would wait, or
    # fails, is left: FastAPI has read no JSON.
    reading = http_request.json()
    try:
        reading.send(None)
    except StopIteration as done:
        return done.value if isinstance(done.value, Mapping) else {}
    except Exception:
        return {}
    with contextlib.suppress(RuntimeError):
        reading.close()
    return {}


def check_labels(labels: Any, known: Mapping[str, Any] | None) -> None:
    """Raise unless SGLang's metrics can be counted by these labels.

    Parameters
    ----------
    labels : Any
        ``custom_labels`` of a request.
    known : Mapping or None
        Labels that the metrics have; None without metrics.

    Raises
    ------
    ConfigError
        Because a label that the metrics lack ends SGLang's tokenizer process.
    """
    if known is None or labels is None:
        return
    if not isinstance(labels, Mapping):
        raise ConfigError(f"{_LABELS} must be an object, got {shown(labels)}.")
    for name, value in labels.items():
        if name not in known:
            raise ConfigError(
                f"{_LABELS} has {shown(name)}, which this server does not count by. "
                "Leave it out, or start the server with "
                "--tokenizer-metrics-allowed-custom-labels."
            )
        if isinstance(value, str):
            check_name(f"{_LABELS}.{name}", value)


def _has_options(fields: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(fields, Mapping) and SWITCH in fields


def _with(params: Any, asked: Mapping[str, Any]) -> Any:
    """Sampling parameters of one prompt with these options, unless it has its own."""
    if params is None:
        params = {}
    if not isinstance(params, Mapping):
        return params
    custom = params.get(_CUSTOM)
    if custom is None:
        custom = {}
    if not isinstance(custom, Mapping) or SWITCH in custom:
        return params
    return {**params, _CUSTOM: {**custom, SWITCH: asked}}


def _read(value: Any, where: str, defaults: KVCompressOptions) -> Mapping[str, Any]:
    """Options as an object, checked."""
    asked = _parsed(value, where) if isinstance(value, str) else value
    parse_options(asked, defaults, where, _EXAMPLE)
    return asked


def _parsed(text: str, where: str) -> Any:
    if len(text) > MAX_TEXT:
        raise ConfigError(
            f"{where} may have at most {MAX_TEXT} characters, got {len(text)}."
        )
    try:
        if text.lstrip().startswith("{"):
            return json.loads(text)
        # One pair each, or a ValueError.
        pairs = [(key, value) for key, value in (p.split("=") for p in text.split(","))]
    except (ValueError, RecursionError):
        raise ConfigError(
            f"{where} must be key=value, several with commas between them, or JSON, "
            f"{_EXAMPLE}; got {shown(text)}."
        ) from None
    asked = {key.strip(): _scalar(value.strip()) for key, value in pairs}
    if len(asked) < len(pairs):
        raise ConfigError(f"{where} has a key twice, got {shown(text)}.")
    return asked


def _scalar(text: str) -> Any:
    """A number or a truth value as JSON writes them; else the text, to be refused."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
