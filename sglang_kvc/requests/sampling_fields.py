"""Bounds on ``sampling_params``, which SGLang hands to the scheduler nearly unchecked.

Over HTTP they are any JSON object. A value of the wrong type or size would end the
scheduler, hence the server: ``top_k`` of 2**40 overflows a tensor, a logit bias of 1e39
makes every probability nan, a stop token beyond the vocabulary is an index out of
bounds. SGLang still judges what is sensible; this module, what can be computed with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sglang_kvc.config.checks import MAX_TOKENS, check_int, check_number, check_text
from sglang_kvc.config.shown import shown, suggestion
from sglang_kvc.errors import ConfigError, UnsupportedModeError
from sglang_kvc.requests.stop_regex import check_stop_regex
from sglang_kvc.upstream.compat import in_force

MAX_N = 1024
"""Answers to one prompt: each carries its own copy of the prompt to the scheduler."""
MAX_IDS = 1024
"""Token ids in one list, entries of a logit bias: the scheduler loops over them."""
MAX_STOPS, MAX_STOP_CHARACTERS = 64, 1024
"""Every one is looked for after every token."""
MAX_STOP_REGEX = 8
MAX_GRAMMAR = {
    "json_schema": 1 << 16,
    "structural_tag": 1 << 16,
    "ebnf": 1 << 14,
    "regex": 1 << 11,
}
"""Characters: compiling takes time that grows faster than the text."""
MAX_GRAMMAR_DEPTH = 64
"""Brackets within brackets: the compiler is recursive."""

MAX_REPEATS = {"regex": 64, "ebnf": 128}
"""Quantifiers: with [a-z]? 150 times, compiling takes a quarter minute."""

_MAX_LOGIT = 1e6
_NAMED = "sampling_params."

_INTEGERS = {
    "max_new_tokens": (0, MAX_TOKENS),
    "min_new_tokens": (0, MAX_TOKENS),
    "top_k": (-1, MAX_TOKENS),
    "n": (1, MAX_N),
    "stream_interval": (0, MAX_TOKENS),
    "sampling_seed": (-(1 << 63), (1 << 64) - 1),
}
# Within these, float32 neither overflows nor rounds to a zero that is divided by.
_NUMBERS = {
    "temperature": (0.0, 1e6),
    "top_p": (1e-9, 1.0),
    "min_p": (0.0, 1.0),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
    "repetition_penalty": (1e-3, 2.0),
}
_SWITCHES = (
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "no_stop_trim",
    # Set by the OpenAI API for some tool calls.
    "ebnf_full_assistant",
)
_SINCE = {
    "beam_width": "0.5.19",
    "ebnf_full_assistant": "0.5.21",
    "watermark": "0.5.22",
}
"""First release of SGLang that has the parameter, where it is a later one."""
INTERNAL = (
    "stop_strs",
    "stop_regex_strs",
    "stop_str_max_len",
    "stop_regex_max_len",
    "is_normalized",
)
"""Fields of SGLang's record that it fills in itself."""


def check_sampling_params(params: Any, vocab: int) -> None:
    """Raise unless the scheduler can compute with these sampling parameters.

    Parameters
    ----------
    params : Any
        ``sampling_params`` of one prompt.
    vocab : int
        Size of the vocabulary.

    Raises
    ------
    ConfigError
        With a message meant for the sender of the request.
    """
    if not isinstance(params, Mapping):
        raise ConfigError(
            f'sampling_params must be an object, for example {{"temperature": 0}}; '
            f"got {shown(params)}."
        )
    for name, value in params.items():
        if name not in SERVED:
            raise ConfigError(
                f"Unknown sampling parameter {shown(name)}."
                f"{suggestion(name, SERVED)} Leave it out."
            )
        # SGLang takes null as its default.
        if value is not None:
            SERVED[name](f"{_NAMED}{name}", value, vocab)
    if params.get("n", 1) is None:
        raise ConfigError(f"{_NAMED}n must be an integer, got None. Leave it out.")


def check_ids(name: str, ids: Any, vocab: int, most: int) -> None:
    """Raise unless `ids` is a list of at most `most` token ids of the vocabulary.

    Raises
    ------
    ConfigError
        With the name, the rule and the id found.
    """
    if not isinstance(ids, (list, tuple, set, frozenset)):
        raise ConfigError(f"{name} must be a list of token ids, got {shown(ids)}.")
    if len(ids) > most:
        raise ConfigError(f"{name} may have at most {most} entries, got {len(ids)}.")
    for token in ids:
        check_int(f"Every entry of {name}", token, 0, vocab - 1)


def _integer(low: int, high: int) -> Callable[[str, Any, int], None]:
    return lambda name, value, _vocab: check_int(name, value, low, high)


def _number(low: float, high: float) -> Callable[[str, Any, int], None]:
    return lambda name, value, _vocab: check_number(name, value, low, high)


def _switch(name: str, value: Any, _vocab: int) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {shown(value)}.")


def _stop_ids(name: str, value: Any, vocab: int) -> None:
    if isinstance(value, list):
        # SGLang drops nulls.
        value = [token for token in value if token is not None]
    check_ids(name, value, vocab, MAX_IDS)


def _logit_bias(name: str, value: Any, vocab: int) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(
            f'{name} must be an object, for example {{"42": -1.5}}; got {shown(value)}.'
        )
    if len(value) > MAX_IDS:
        raise ConfigError(
            f"{name} may have at most {MAX_IDS} entries, got {len(value)}."
        )
    for key, bias in value.items():
        digits = (
            str(key) if isinstance(key, (str, int)) and len(shown(key)) < 20 else ""
        )
        token = int(digits) if digits.isdecimal() else -1
        if not 0 <= token < vocab:
            raise ConfigError(
                f"Every key of {name} must be a token id in 0..{vocab - 1}, got "
                f"{shown(key)}."
            )
        check_number(f"Every value of {name}", bias, -_MAX_LOGIT, _MAX_LOGIT)


def _strings(name: str, value: Any, most: int, characters: int) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise ConfigError(
            f"{name} must be a string or a list of them, got {shown(value)}."
        )
    if len(texts) > most or any(len(text) > characters for text in texts):
        longest = max(map(len, texts))
        raise ConfigError(
            f"{name} may have at most {most} entries of {characters} characters, got "
            f"{len(texts)}, the longest of {longest}."
        )
    for text in texts:
        check_text(name, text)
    return texts


def _stop(name: str, value: Any, _vocab: int) -> None:
    _strings(name, value, MAX_STOPS, MAX_STOP_CHARACTERS)


def _stop_regex(name: str, value: Any, _vocab: int) -> None:
    for pattern in _strings(name, value, MAX_STOP_REGEX, MAX_STOP_CHARACTERS):
        check_stop_regex(pattern)


def _grammar(name: str, value: Any, _vocab: int) -> None:
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be a string, got {shown(value)}.")
    kind = name.removeprefix(_NAMED)
    most = MAX_GRAMMAR[kind]
    if len(value) > most:
        raise ConfigError(
            f"{name} may have at most {most} characters, got {len(value)}."
        )
    check_text(name, value)
    repeats = sum(map(value.count, "?*+{"))
    if repeats > MAX_REPEATS.get(kind, most):
        raise ConfigError(
            f"{name} may have at most {MAX_REPEATS[kind]} of ? * + {{, got {repeats}. "
            "Write a count, for example [a-z]{0,9}."
        )
    depth = deepest = 0
    for character in value:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    if deepest > MAX_GRAMMAR_DEPTH:
        raise ConfigError(
            f"{name} may nest at most {MAX_GRAMMAR_DEPTH} brackets, got {deepest}."
        )


def _custom_params(name: str, value: Any, _vocab: int) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(
            f'{name} must be an object, for example {{"kv_compress": {{"rate": 8}}}}; '
            f"got {shown(value)}."
        )


def _beam_width(name: str, value: Any, vocab: int) -> None:
    check_int(name, value, 1, MAX_TOKENS)
    if value > 1:
        # Beams share pages by row and part later; a packed request has no such rows.
        _unserved("beam search")(name, value, vocab)


def _unserved(feature: str) -> Callable[[str, Any, int], None]:
    def refuse(name: str, value: Any, _vocab: int) -> None:
        raise UnsupportedModeError(
            f"{name}={shown(value)}: KV-Compress does not serve {feature}. Leave it "
            "out."
        )

    return refuse


_CHECKS: dict[Any, Callable[[str, Any, int], None]] = {
    **{name: _integer(*bounds) for name, bounds in _INTEGERS.items()},
    **{name: _number(*bounds) for name, bounds in _NUMBERS.items()},
    **dict.fromkeys(_SWITCHES, _switch),
    **dict.fromkeys(MAX_GRAMMAR, _grammar),
    "stop": _stop,
    "stop_regex": _stop_regex,
    "stop_token_ids": _stop_ids,
    "logit_bias": _logit_bias,
    "custom_params": _custom_params,
    "beam_width": _beam_width,
    "watermark": _unserved("watermarks"),
}
SERVED = {name: it for name, it in _CHECKS.items() if in_force(_SINCE.get(name, ""))}
"""How every parameter that a client may set is checked."""
