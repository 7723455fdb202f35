"""Find which part of a prompt each of its tokens stands for."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

BROKEN = "\ufffd"
"""What a tokenizer writes for bytes that are no whole character."""


def spell(
    prompt: str, ids: list[int], decode: Callable[[list[list[int]]], list[str]]
) -> list[str]:
    """Text of each token.

    A token by itself may lose its space or be a part of a character. So the prompt is
    read along: spaces go to the token behind them, a character to its first token.

    Parameters
    ----------
    prompt : what `ids` were made of.
    ids : its tokens.
    decode : texts of groups of tokens, all in one call.

    Returns
    -------
    list of str
        As many as `ids`. What is not in the prompt, such as a token for its start, has
        the text that the tokenizer gives it.
    """
    texts = decode([[token] for token in ids])
    runs = [
        [place for place, _ in run]
        for broken, run in groupby(enumerate(texts), lambda it: BROKEN in it[1])
        if broken
    ]
    if runs:
        joined = decode([[ids[place] for place in run] for run in runs])
        for run, text in zip(runs, joined, strict=True):
            for place in run:
                texts[place] = ""
            texts[run[0]] = text
    at = 0
    for place, text in enumerate(texts):
        word = at
        while text and not prompt.startswith(text, word) and _is_space(prompt, word):
            word += 1
        if text and prompt.startswith(text, word):
            texts[place] = prompt[at : word + len(text)]
            at = word + len(text)
    return texts


def _is_space(text: str, place: int) -> bool:
    return text[place : place + 1].isspace()
