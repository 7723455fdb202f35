"""Prompts as they arrive: texts, token ids, or embeddings.

The scheduler makes tensors of them and runs them: a token id beyond the vocabulary,
ragged embeddings or a nan would end it, also in the middle of others' requests.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_kvc.config.checks import check_int, check_text
from sglang_kvc.config.shown import shown
from sglang_kvc.errors import ConfigError, UnsupportedModeError

CHARACTERS_PER_TOKEN = 128
"""A longer text cannot fit in the context, so it need not be tokenized."""
USUAL_CHARACTERS = 8
"""A longer text hardly fits: it is counted in pieces, up to what does not fit."""
_PIECE = 1 << 16
_MORE = 16
"""Tokens that cutting a text in two may add."""

_LARGEST = float(np.finfo(np.float16).max)
"""Also in 16 bits no entry becomes infinite."""


@dataclass(frozen=True)
class Limits:
    """What a server can compute with.

    Parameters
    ----------
    vocab : int
        Rows of the embedding.
    context : int
        Tokens of the longest request.
    width : int
        Numbers of an embedding.
    on_cpu : bool
        Whether the model runs on a CPU.
    count : callable, optional
        Number of tokens of a text. None if a text may be of any length, because SGLang
        truncates it, or of none.
    """

    vocab: int
    context: int
    width: int
    on_cpu: bool
    count: Callable[[str], int] | None = None


def check_prompts(request: Any, limits: Limits) -> int | None:
    """Check what is to be continued; return how many prompts there are.

    Parameters
    ----------
    request : sglang.srt.managers.io_struct.GenerateReqInput
    limits : Limits

    Returns
    -------
    int or None
        None for a prompt that is alone, no batch of one.

    Raises
    ------
    ConfigError
        If a text is too long or no Unicode, a token is none of the vocabulary, or the
        numbers of an embedding do not fit the model.
    """
    counts = set()
    if request.text is not None:
        alone = isinstance(request.text, str)
        texts = [request.text] if alone else request.text
        if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
            raise ConfigError(f"text must be a string or several, got {shown(texts)}.")
        for text in texts:
            if len(text) > limits.context * CHARACTERS_PER_TOKEN:
                raise ConfigError(
                    f"The text has {len(text)} characters, more than can fit in the "
                    f"context of {limits.context} tokens. Shorten it."
                )
            check_text("text", text)
            _check_length(text, limits)
        counts.add(None if alone else len(texts))
    if request.input_ids is not None:
        rows, alone = _rows(request.input_ids)
        for row in rows:
            _check_input_ids(row, limits.vocab)
        counts.add(None if alone else len(rows))
    # SGLang drops embeddings that come with a text or with ids.
    if request.input_embeds is not None and not counts:
        counts.add(check_embeds(request.input_embeds, limits.width, limits.on_cpu))
    if len(counts) > 1:
        raise ConfigError(
            "text and input_ids must hold the same number of prompts. Send one of them."
        )
    return counts.pop() if counts else None


def _check_length(text: str, limits: Limits) -> None:
    """Raise if a text is too long, before all of it keeps everybody waiting.

    SGLang tokenizes on the event loop, a megabyte in one to five seconds.
    """
    if limits.count is None or len(text) <= limits.context * USUAL_CHARACTERS:
        return
    tokens = 0
    for start in range(0, len(text), _PIECE):
        tokens += limits.count(text[start : start + _PIECE]) - _MORE
        if tokens > limits.context:
            raise ConfigError(
                f"The text of {len(text)} characters has more than {tokens} tokens; "
                f"the context is {limits.context}. Shorten it."
            )


def _rows(ids: Any) -> tuple[list[Any], bool]:
    if not isinstance(ids, (list, tuple)) or not ids:
        raise ConfigError(
            f"input_ids must be a list of token ids, or of lists of them; got "
            f"{shown(ids)}."
        )
    alone = not isinstance(ids[0], list)
    return ([ids] if alone else list(ids)), alone


def _check_input_ids(row: Any, vocab: int) -> None:
    try:
        ids = np.frombuffer(array("q", row), dtype=np.int64)
    except (TypeError, OverflowError, ValueError):
        raise ConfigError(
            f"input_ids must be integers in 0..{vocab - 1}, got {shown(row)}."
        ) from None
    if not ids.size:
        raise ConfigError("A prompt in input_ids has no tokens. Send at least one.")
    outside = (ids < 0) | (ids >= vocab)
    if outside.any():
        at = int(outside.argmax())
        raise ConfigError(
            f"input_ids must be in 0..{vocab - 1}, the vocabulary; got {ids[at]} at "
            f"position {at}."
        )


def check_embeds(embeds: Any, width: int, on_cpu: bool) -> int | None:
    """Check ``input_embeds``; return the number of prompts, None for one alone.

    Parameters
    ----------
    embeds : list
        ``[tokens][width]`` or ``[prompts][tokens][width]``.
    width : int
        Width of the model.
    on_cpu : bool
        Whether the model runs on a CPU.

    Raises
    ------
    UnsupportedModeError
        On a CPU: SGLang computes such prompts in bfloat16 whatever the model's type.
    ConfigError
        If they are ragged, of another width, or not finite numbers.
    """
    if on_cpu:
        raise UnsupportedModeError(
            "KV-Compress does not serve input_embeds on a CPU. Send text or input_ids."
        )
    try:
        several = isinstance(embeds[0][0], list)
        for prompt in embeds if several else [embeds]:
            # By prompt: those of a batch differ in length.
            _check_rows("input_embeds", np.asarray(prompt, dtype=np.float64), width)
    except (TypeError, ValueError, IndexError, KeyError, OverflowError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            "input_embeds must be a list of equally long lists of numbers, or several "
            f"of those; got {shown(embeds)}."
        ) from None
    return len(embeds) if several else None


def check_overrides(value: Any, width: int) -> None:
    """Check one entry of ``positional_embed_overrides``.

    Parameters
    ----------
    value : sglang.srt.managers.embed_types.PositionalEmbeds
        What else there is came over HTTP, where SGLang has no form for it.
    width : int
        Width of the model.

    Raises
    ------
    ConfigError
        If it is something else, or does not fit the model.
    """
    embeds, positions = (
        getattr(value, "embeds", None),
        getattr(value, "positions", None),
    )
    if embeds is None or not isinstance(positions, list):
        raise ConfigError(
            "positional_embed_overrides must be SGLang's PositionalEmbeds, which only "
            f"Engine.generate can send; got {shown(value)}. Leave it out."
        )
    _check_rows("positional_embed_overrides", embeds.double().cpu().numpy(), width)
    for position in positions:
        check_int("Every position of positional_embed_overrides", position, 0)


def _check_rows(name: str, rows: Any, width: int) -> None:
    if rows.ndim != 2 or not rows.shape[0] or rows.shape[1] != width:
        raise ConfigError(
            f"{name} must be rows of {width} numbers, as wide as the model; got shape "
            f"{shown(list(rows.shape))}."
        )
    if not (np.abs(rows) <= _LARGEST).all():
        raise ConfigError(
            f"Every number of {name} must be finite and at most {_LARGEST:.0f}."
        )
