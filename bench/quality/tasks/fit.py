"""Find how much filler makes a prompt of a given number of tokens."""

from __future__ import annotations

from collections.abc import Callable

SLACK = 4
"""Tokens that a prompt may be too short before another guess is made."""


def largest_fitting(
    size: Callable[[int], int], length: int, limit: int, slack: int = SLACK
) -> int:
    """Most units of filler with which a prompt is no longer than `length` tokens.

    Every call of `size` tokenizes a whole prompt, so the next guess is made from the
    tokens per unit seen so far; a prompt within `slack` tokens is good enough.

    Parameters
    ----------
    size : callable
        Tokens of the prompt with so many units; grows with them.
    length : int
        Tokens aimed at.
    limit : int
        Most units there are.

    Returns
    -------
    int
        Between 0 and `limit`.

    Raises
    ------
    ValueError
        If the prompt is too long without any filler.
    """
    low, low_size = 0, size(0)
    if low_size > length:
        raise ValueError(f"{length} tokens are too few: {low_size} without any filler")
    empty, high = low_size, limit + 1
    guess = min(limit, max(1, length // 16))
    while high - low > 1 and length - low_size > slack:
        guess = min(max(guess, low + 1), high - 1)
        tokens = size(guess)
        if tokens <= length:
            low, low_size = guess, tokens
        else:
            high = guess
        per_unit = max((tokens - empty) / guess, 1e-3)
        guess = low + int((length - low_size) / per_unit)
    return low
