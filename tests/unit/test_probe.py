"""Which tokens of a prompt look at a chunk."""

from __future__ import annotations

import pytest

from sglang_kvc.scheduling.chunking import probe_tokens

PROMPT = range(100, 300)


@pytest.mark.parametrize(
    ("length", "room", "first"),
    [
        (64, 32, 168),  # the last 32
        (64, 8, 192),  # no more than the pages hold
        (176, 32, 176),  # what is computed already does not run again
        (192, 32, 192),
    ],
)
def test_the_end_of_the_prompt(length: int, room: int, first: int) -> None:
    assert probe_tokens(PROMPT, length, room) == tuple(PROMPT[first:])


def test_none_inside_a_page() -> None:
    """A probe's pages hold nothing else; such a chunk is scored by its own queries."""
    assert probe_tokens(PROMPT, 65, 32) == ()
