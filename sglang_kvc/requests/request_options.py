"""KV-Compress settings of one request.

They arrive in SGLang's ``sampling_params.custom_params`` (OpenAI: ``extra_body``)::

    {"kv_compress": {"rate": 8}}          keep 1/8 of this request
    {"kv_compress": {"budget": 1024}}     keep 1024 tokens per KV head on average
    {"kv_compress": {"enabled": false}}   keep everything
    {"kv_compress": {"report_heads": true}}   tell what every head keeps

A mistake costs this request an HTTP 400 and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang_kvc.config.checks import check_rate
from sglang_kvc.config.options import SWITCH, KVCompressOptions
from sglang_kvc.config.shown import shown, suggestion
from sglang_kvc.errors import ConfigError

_KEYS = ("enabled", "rate", "budget", "report_heads")
_VALID = f"Valid: {', '.join(_KEYS)};"
_EXAMPLE = 'for example {"kv_compress": {"rate": 8}}'


@dataclass(frozen=True)
class RequestOptions:
    """What one request asked for.

    Parameters
    ----------
    enabled : bool
        False keeps the whole KV cache of this request.
    rate : float, optional
        Compression rate of this request; None takes the server's setting.
    budget : int, optional
        Tokens kept per KV head on average; None takes the server's setting.
    report_heads : bool
        Report how many tokens every KV head holds after a pass.
    """

    enabled: bool = True
    rate: float | None = None
    budget: int | None = None
    report_heads: bool = False


def parse_request_options(
    custom_params: Mapping[str, Any] | None, defaults: KVCompressOptions
) -> RequestOptions:
    """Parse and validate the ``kv_compress`` entry of a request.

    Parameters
    ----------
    custom_params : Mapping or None
        ``sampling_params.custom_params``. Entries other than ``kv_compress`` belong
        to others and are ignored; what is no mapping is left for SGLang to refuse.
    defaults : KVCompressOptions
        The server's settings; they bound the budget from below.

    Returns
    -------
    RequestOptions

    Raises
    ------
    ConfigError
        With a message meant for the sender of the request.
    """
    if not isinstance(custom_params, Mapping) or SWITCH not in custom_params:
        return RequestOptions()
    asked = custom_params[SWITCH]
    if not isinstance(asked, Mapping):
        raise ConfigError(
            f"custom_params[{SWITCH!r}] must be an object, {_EXAMPLE}; got "
            f"{shown(asked)}."
        )
    if len(asked) > len(_KEYS):
        raise ConfigError(
            f"custom_params[{SWITCH!r}] has {len(asked)} keys, but there are only "
            f"{len(_KEYS)}. {_VALID} {_EXAMPLE}."
        )
    for key in asked:
        if key not in _KEYS:
            raise ConfigError(_unknown_key(key))
    options = RequestOptions(**asked)
    _check(options, defaults)
    return options


def resolve_budget(
    request: RequestOptions, defaults: KVCompressOptions, logical_len: int
) -> int | None:
    """Tokens this request may keep at its present length.

    Parameters
    ----------
    request : RequestOptions
        Settings of the request.
    defaults : KVCompressOptions
        Settings of the server.
    logical_len : int
        Tokens the request has seen (prompt and output).

    Returns
    -------
    int or None
        A multiple of the page size, per KV head on average; None if the request is
        not to be compressed.
    """
    if not request.enabled:
        return None
    return defaults.budget_tokens(logical_len, request.rate, request.budget)


def validate_sampling_params(sampling_params: Any, defaults: KVCompressOptions) -> None:
    """Check the ``kv_compress`` entries of a request as it arrives over HTTP.

    Parameters
    ----------
    sampling_params : dict, list of dict, or None
        ``GenerateReqInput.sampling_params``, for all prompts or one for each.
        Anything else is left for SGLang to refuse.
    defaults : KVCompressOptions
        The server's settings.

    Raises
    ------
    ConfigError
        With a message meant for the sender of the request.
    """
    several = isinstance(sampling_params, (list, tuple))
    for params in sampling_params if several else [sampling_params]:
        if isinstance(params, Mapping):
            parse_request_options(params.get("custom_params"), defaults)


def _check(options: RequestOptions, defaults: KVCompressOptions) -> None:
    for name in ("enabled", "report_heads"):
        value = getattr(options, name)
        if not isinstance(value, bool):
            raise ConfigError(
                f"{SWITCH}.{name} must be true or false, got {shown(value)}."
            )
    if options.rate is not None:
        check_rate(f"{SWITCH}.rate", options.rate)
    if options.budget is not None:
        defaults.check_budget(f"{SWITCH}.budget", options.budget)
    if options.rate is not None and options.budget is not None:
        raise ConfigError(
            f"{SWITCH}.rate={options.rate} and {SWITCH}.budget={options.budget} "
            "exclude each other; give one of them."
        )
    asks = options.rate is not None or options.budget is not None
    if not options.enabled and asks:
        raise ConfigError(
            f"{SWITCH}.enabled=false keeps the whole cache, but a rate or budget is "
            "given too; drop one of them."
        )


def _unknown_key(key: Any) -> str:
    return (
        f"Unknown key {shown(key)} in custom_params[{SWITCH!r}]."
        f"{suggestion(key, _KEYS)} {_VALID} {_EXAMPLE}."
    )
