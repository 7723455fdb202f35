"""Snapshots in host memory: which of its pages they get, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_kvc.config.options import KVCompressOptions
from sglang_kvc.errors import ConfigError
from sglang_kvc.kernels.layout import Arena
from sglang_kvc.memory import host_pages
from sglang_kvc.memory.host_pages import HostPages
from sglang_kvc.sessions.host import HostShelf
from sglang_kvc.sessions.snapshot import Snapshot


def snapshot(number: int) -> Snapshot:
    return Snapshot(number, b"", 16, 16, offsets=None, unit=None, passes=1)


def tokens(pages: list[int]) -> torch.Tensor:
    """Token ids of pages of the pool."""
    return (torch.tensor(pages)[:, None] * 16 + torch.arange(16)).flatten()


def make_arena() -> Arena:
    k, v = torch.zeros(2, 100, 2, 3, 16, 8)
    return Arena(k=k, v=v, score=k[..., 0], scales=None)


def test_more_than_the_machine_has_is_refused(monkeypatch: Any) -> None:
    free = SimpleNamespace(available=1000)
    monkeypatch.setattr(host_pages.psutil, "virtual_memory", lambda: free)
    with pytest.raises(ConfigError, match="sessions-host 0.5 asks"):
        HostPages(make_arena(), 0.5)


def test_room_is_made_for_what_comes_last() -> None:
    shelf = HostShelf(pages=6)
    one, two, three = map(snapshot, range(3))
    for it in (one, two, three):
        assert shelf.victim(32) is None
        shelf.put(it, tokens([1, 2]))
    assert (len(shelf), shelf.tokens_of(two)) == (3, 32)
    assert shelf.victim(16) is one
    shelf.wanted = one
    assert shelf.victim(16) is two
    three.superseded = True
    assert shelf.victim(16) is three
    shelf.drop(three)
    assert three not in shelf
    assert shelf.victim(32) is None
    assert shelf.can_have(64)
    assert not shelf.can_have(80)
    shelf.wanted = None
    assert shelf.can_have(96)
    assert not shelf.can_have(97)


def test_each_page_has_one_owner_and_each_copy_is_made_once() -> None:
    shelf = HostShelf(pages=5)
    one, two, three = map(snapshot, range(3))
    shelf.put(one, tokens([1, 2]))
    shelf.put(two, tokens([3]))
    shelf.take(one, tokens([7, 8]))
    shelf.put(three, tokens([4, 5, 6, 7]))
    copies = shelf.take_copies()
    assert [(it.slots, it.to_host) for it in copies] == [
        ([0, 1], True),
        ([2], True),
        ([0, 1], False),
        ([0, 1, 3, 4], True),
    ]
    assert torch.equal(copies[2].tokens, tokens([7, 8]))
    assert shelf.take_copies() == []
    assert shelf.brought_back == 1
    shelf.clear()
    assert (len(shelf), shelf.victim(80)) == (0, None)


def test_a_flush_forgets_copies_too() -> None:
    shelf = HostShelf(pages=5)
    shelf.put(snapshot(1), tokens([1, 2]))
    shelf.clear()
    assert shelf.take_copies() == []


def test_host_memory_without_sessions_is_refused() -> None:
    with pytest.raises(ConfigError, match="Switch sessions on"):
        KVCompressOptions(sessions_host=1)
    with pytest.raises(ConfigError, match="sessions_host"):
        KVCompressOptions(sessions=True, sessions_host=-1)
    assert KVCompressOptions(sessions=True, sessions_host=0.5).sessions_host == 0.5
