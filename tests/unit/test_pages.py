"""Tokens and whole pages."""

from __future__ import annotations

import pytest

from sglang_kvc.config.pages import PAGE_SIZE, ceil_tokens, floor_tokens, pages_of


@pytest.mark.parametrize(
    ("tokens", "whole", "pages"),
    [(0, 0, 0), (1, 0, 1), (15, 0, 1), (16, 1, 1), (17, 1, 2), (32, 2, 2)],
)
def test_rounding(tokens: int, whole: int, pages: int) -> None:
    assert floor_tokens(tokens) == whole * PAGE_SIZE
    assert ceil_tokens(tokens) == pages * PAGE_SIZE
    assert pages_of(tokens) == pages


def test_both_page_sizes_agree() -> None:
    """Options know nothing of torch, kernels nothing of options: it is said twice."""
    from sglang_kvc.kernels import layout

    assert layout.PAGE_SIZE == PAGE_SIZE
