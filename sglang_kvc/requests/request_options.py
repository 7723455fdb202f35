"""KV-Compress settings of one request.

They arrive in SGLang's ``sampling_params.custom_params`` (OpenAI: ``extra_body``)::

    {"kv_compress": {"rate": 8}}          keep 1/8 of this request
    {"kv_compress": {"budget": 1024}}     keep 1024 tokens per KV head on average
    {"kv_compress": {"answer": 512}}      keep the answer's last 512 tokens beside that
    {"kv_compress": {"delay": 32}}        wait for 32 tokens of the answer first
    {"kv_compress": {"enabled": false}}   keep everything
    {"kv_compress": {"report_heads": true}}   tell what every head keeps
    {"kv_compress": {"report_tokens": true}}  tell who keeps every token of the prompt
    {"kv_compress": {"keep": "none"}}     leave nothing for a next turn
    {"kv_compress": {"resume": false}}    start from no snapshot of an earlier turn

A mistake costs this request an HTTP 400 and nothing else. Other ways to send them are
in `carried_options`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang_kvc.config.checks import check_choice, check_int, check_switch
from sglang_kvc.config.keep import Keep
from sglang_kvc.config.metrics import METRICS
from sglang_kvc.config.option_checks import MAX_DELAY
from sglang_kvc.config.options import SWITCH, KVCompressOptions
from sglang_kvc.config.shown import shown, suggestion
from sglang_kvc.errors import ConfigError

_KEYS = (
    *("enabled", "rate", "budget", "answer", "delay"),
    *("report_heads", "report_tokens", "keep", "resume"),
)
LEAVES = ("compressed", "whole", "none")
"""What a request may leave when it ends, see `RequestOptions.leaves`."""
_VALID = f"Valid: {', '.join(_KEYS)};"
_WHERE = f"custom_params[{SWITCH!r}]"
_EXAMPLE = 'for example {"kv_compress": {"rate": 8}}'


@dataclass(frozen=True)
class RequestOptions:
    """What one request asked for.

    Parameters
    ----------
    enabled : bool
        False keeps the whole KV cache of this request.
    keep : Keep, optional
        How much this request keeps; None takes the server's setting.
    answer : int, optional
        Last tokens of its answer that stay whole; None takes the server's setting.
    delay : int, optional
        Decoded tokens that its first pass waits for; None takes the server's setting.
    report_heads : bool
        Report how many tokens every KV head holds after a pass.
    report_tokens : bool
        Report, with the complete answer, how many heads hold each token of the prompt.
    leaves : str, optional
        What stays in the pool when it ends (key ``keep``): a snapshot of what it holds
        packed, only what the prefix cache keeps of its prompt, or nothing. None takes
        the server's setting.
    resume : bool, optional
        Whether it may start from a snapshot; None takes the server's setting.
    """

    enabled: bool = True
    keep: Keep | None = None
    answer: int | None = None
    delay: int | None = None
    report_heads: bool = False
    report_tokens: bool = False
    leaves: str | None = None
    resume: bool | None = None


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
    return parse_options(custom_params[SWITCH], defaults)


def parse_options(
    asked: Any,
    defaults: KVCompressOptions,
    where: str = _WHERE,
    example: str = _EXAMPLE,
) -> RequestOptions:
    """Parse and validate options of a request, wherever they came from.

    Parameters
    ----------
    asked : Any
        What the sender gave; a mapping if it is right.
    defaults : KVCompressOptions
        The server's settings; they bound the budget from below.
    where, example : str
        Which field it is, and what it may look like, for the message.

    Returns
    -------
    RequestOptions

    Raises
    ------
    ConfigError
        With a message meant for the sender of the request.
    """
    if not isinstance(asked, Mapping):
        raise ConfigError(f"{where} must be an object, {example}; got {shown(asked)}.")
    if len(asked) > len(_KEYS):
        raise ConfigError(
            f"{where} has {len(asked)} keys, but there are only {len(_KEYS)}. {_VALID} "
            f"{example}."
        )
    for key in asked:
        if key not in _KEYS:
            raise ConfigError(
                f"Unknown key {shown(key)} in {where}.{suggestion(key, _KEYS)} "
                f"{_VALID} {example}."
            )
    return _checked(asked, defaults)


def resolve_budget(
    request: RequestOptions, defaults: KVCompressOptions, logical_len: int
) -> int | None:
    """Tokens this request may keep at its present length, its answer's apart.

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
    return defaults.budget_tokens(logical_len, request.keep)


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


def _checked(asked: Mapping[str, Any], defaults: KVCompressOptions) -> RequestOptions:
    for name in ("enabled", "report_heads", "report_tokens", "resume"):
        check_switch(f"{SWITCH}.{name}", asked.get(name, False))
    rate, budget = asked.get("rate"), asked.get("budget")
    answer, delay = asked.get("answer"), asked.get("delay")
    asks = rate is not None or budget is not None
    keep = Keep(rate, budget, prefix=f"{SWITCH}.") if asks else None
    if budget is not None:
        defaults.check_budget(f"{SWITCH}.budget", budget)
    if answer is not None:
        check_int(f"{SWITCH}.answer", answer, 0)
    if delay is not None:
        _check_delay(delay, defaults)
    enabled = asked.get("enabled", True)
    asks = asks or answer is not None or delay is not None
    if asks and not enabled:
        raise ConfigError(
            f"{SWITCH}.enabled=false keeps the whole cache, but a rate, a budget, an "
            "answer or a delay is given too; drop one of them."
        )
    _check_session(asked, defaults, enabled)
    return RequestOptions(
        enabled,
        keep,
        answer,
        delay,
        report_heads=asked.get("report_heads", False),
        report_tokens=asked.get("report_tokens", False),
        leaves=asked.get("keep"),
        resume=asked.get("resume"),
    )


def _check_delay(delay: Any, defaults: KVCompressOptions) -> None:
    """Check how long a first pass waits; only metrics that look at queries gain."""
    check_int(f"{SWITCH}.delay", delay, 0, MAX_DELAY)
    if delay and not METRICS[defaults.metric].observes:
        raise ConfigError(
            f"{SWITCH}.delay={delay} waits for queries of the answer; this server's "
            f"metric={defaults.metric} does not look at queries. Leave it out."
        )


def _check_session(
    asked: Mapping[str, Any], defaults: KVCompressOptions, enabled: bool
) -> None:
    """Check what a request says of sessions; see `RequestOptions`."""
    given = [name for name in ("keep", "resume") if name in asked]
    if not given:
        return
    if "keep" in asked:
        check_choice(f"{SWITCH}.keep", asked["keep"], LEAVES)
    if not defaults.sessions:
        raise ConfigError(
            f"{SWITCH}.{given[0]} is about sessions, which this server does not keep; "
            "leave it out, or start the server with --kv-compress-sessions."
        )
    lossy = [
        text
        for text, is_lossy in (
            ("keep=compressed", asked.get("keep") == "compressed"),
            ("resume=true", asked.get("resume")),
        )
        if is_lossy
    ]
    if lossy and not enabled:
        raise ConfigError(
            f"{SWITCH}.enabled=false keeps the whole cache, but {lossy[0]} is given "
            "too; drop one of them."
        )
    if asked.get("resume") and asked.get("report_tokens"):
        raise ConfigError(
            f"{SWITCH}.report_tokens tells who keeps every token of the prompt, which "
            "is not known of a snapshot; drop it or resume=true."
        )
