"""What watches the pages of a prefix tree sees every write."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from tests.engine.shared_pages import SharedPages
from tests.unit.test_session_tree import POOL, TEXT, Held

PAGES = POOL // 16 + 1


class Watched(Held):
    """A tree whose pages are watched."""

    def __init__(self) -> None:
        super().__init__()
        k, v, score = (torch.rand(PAGES, 2, 2) for _ in range(3))
        self.arena: Any = SimpleNamespace(k=k, cells=(k, v, score))
        self.shared = SharedPages(self.tree, self.allocator, self.arena)


@pytest.fixture(params=[True, False])
def watched(request: pytest.FixtureRequest) -> Watched:
    one = Watched()
    one.shared.fill = request.param
    return one


@pytest.mark.parametrize("part", range(3))
def test_a_write_is_seen(watched: Watched, part: int) -> None:
    watched.snapshot()
    watched.shared.check()
    watched.arena.cells[part][watched.shared.pages()[1], 0, 1] += 1
    with pytest.raises(AssertionError, match="shared pages written"):
        watched.shared.check()


def test_a_write_is_seen_when_the_page_is_freed(watched: Watched) -> None:
    """Also between two looks."""
    watched.snapshot()
    watched.arena.k[watched.shared.pages()[1], 0, 1] += 1
    with pytest.raises(AssertionError, match="shared pages written"):
        watched.tree.evict(EvictParams(num_tokens=POOL))


def test_the_same_values_once_more_are_seen_over_a_pattern() -> None:
    watched = Watched()
    before = watched.arena.k.clone()
    watched.shared.fill = True
    watched.snapshot()
    page = watched.shared.pages()[0]
    watched.arena.k[page] = before[page]
    with pytest.raises(AssertionError, match="shared pages written"):
        watched.shared.check()


def test_pages_that_came_back_may_be_written(watched: Watched) -> None:
    """And are watched anew when the tree takes them again."""
    watched.snapshot()
    watched.whole(array("q", TEXT[:96]))
    pages = watched.shared.pages()
    assert watched.shared.taken == len(pages) == 3 + 6
    watched.tree.evict(EvictParams(num_tokens=POOL))
    assert watched.shared.freed == len(pages)
    watched.arena.k[pages] += 1
    watched.shared.check()
    watched.whole(array("q", TEXT[:96]))
    watched.shared.check()
    assert watched.shared.taken == len(pages) + 6


def test_a_flush_ends_the_watch(watched: Watched) -> None:
    watched.snapshot()
    pages = watched.shared.pages()
    watched.tree.reset()
    watched.allocator.clear()
    watched.arena.k[pages] += 1
    watched.shared.check()
    assert watched.shared.freed == watched.shared.taken == len(pages)
