"""Texts have names, and snapshots are found by them."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from sglang_kvc.sessions.snapshot import SHARED, Snapshot
from sglang_kvc.sessions.store import SessionStore
from sglang_kvc.sessions.text import TextChain

TEXT = list(range(1000, 1160))


def chain(*tenant: str | None) -> TextChain:
    return TextChain(tenant or (None, None))


def held(
    store: SessionStore, ids: Any, fold: int, packed: int = 32, **more: Any
) -> Snapshot:
    """A snapshot of the first tokens of a text, held under a node of its number."""
    snapshot = store.make(
        digest=chain().prefix(ids, fold),
        fold=fold,
        packed=packed,
        offsets=None,
        unit=None,
        passes=1,
        **more,
    )
    store.add(snapshot, snapshot.number)
    return snapshot


def test_a_prefix_is_named_by_all_tokens_before_it() -> None:
    names = {chain().prefix(TEXT, length) for length in range(0, 160, 16)}
    assert len(names) == 10
    other = [7, *TEXT[1:]]
    assert not names & {chain().prefix(other, length) for length in range(16, 160, 16)}
    # Two pages in another order are another text.
    swapped = TEXT[16:32] + TEXT[:16]
    assert chain().prefix(swapped, 32) != chain().prefix(TEXT, 32)


def test_names_do_not_depend_on_how_the_text_came_to_be() -> None:
    """A request asks while it has its prompt, and again when it has its answer."""
    growing = chain()
    growing.prefix(TEXT[:50], 48)
    assert growing.prefix(array("q", TEXT), 160) == chain().prefix(TEXT, 160)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((None, None), ("salt", None)),
        (("salt", None), (None, "salt")),
        (("a", "b"), ("ab", None)),
        ((None, None), ("None", "None")),
    ],
)
def test_tenants_share_no_name(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert TextChain(one).prefix(TEXT, 16) != TextChain(other).prefix(TEXT, 16)


def test_the_longest_fold_comes_first_and_of_alike_ones_the_newest() -> None:
    store = SessionStore()
    short, long = held(store, TEXT, 32), held(store, TEXT, 96)
    newer = held(store, TEXT, 32)
    held(store, [7, *TEXT[1:]], 64)
    assert list(store.along(chain(), TEXT, 159)) == [long, newer, short]
    assert list(store.along(chain(), TEXT, 95)) == [newer, short]
    assert list(store.along(chain("salt", None), TEXT, 159)) == []
    assert list(SessionStore().along(chain(), TEXT, 159)) == []


def test_what_the_tree_gives_up_is_forgotten_and_counted() -> None:
    store = SessionStore()
    first, second = held(store, TEXT, 32, 64), held(store, TEXT, 32, 48)
    assert (len(store), store.tokens) == (2, 112)
    store.forget("a node of somebody's prompt", evicted=True)
    store.forget(first.number, evicted=True)
    store.forget(first.number, evicted=True)
    assert (len(store), store.tokens, store.evicted) == (1, 48, 1)
    assert list(store.along(chain(), TEXT, 160)) == [second]
    store.forget(second.number, evicted=False)
    assert (len(store), store.tokens, store.evicted) == (0, 0, 1)
    assert list(store.along(chain(), TEXT, 160)) == []
    third = held(store, TEXT, 48)
    assert third.number == 3
    store.clear()
    assert (len(store), store.tokens) == (0, 0)


def test_a_longer_snapshot_replaces_what_only_its_own_conversation_used() -> None:
    store = SessionStore()
    own = held(store, TEXT, 32)
    own.resumed = 1
    borrowed = held(store, TEXT, 48)
    borrowed.borrowers = 1
    shared = held(store, TEXT, 64)
    shared.resumed = SHARED
    parted = held(store, TEXT, 80)
    parted.branches = True
    held(store, TEXT, 144)
    held(store, [7, *TEXT[1:]], 16)
    assert store.replaced_by(chain(), TEXT, 96) == [own]


def test_what_is_superseded_goes_in_the_order_it_came() -> None:
    store = SessionStore()
    first, second, third = (held(store, TEXT, 16 * n) for n in (1, 2, 3))
    second.superseded = first.superseded = third.superseded = True
    third.borrowers = 1
    held(store, TEXT, 64)
    assert list(store.superseded()) == [first, second]


def test_who_left_first_is_given_up_first_of_what_nobody_is_expected_to_use() -> None:
    store = SessionStore()
    first, second, third, fourth = (held(store, TEXT, 16 * n) for n in (1, 2, 3, 4))
    for at, one in enumerate((second, first, third)):
        one.left_at, one.overdue = at, True
    third.borrowers = 1
    assert list(store.unexpected()) == [second, first]
    fourth.overdue = fourth.branches = True
    assert list(store.unexpected()) == [second, first]


def test_a_continuation_is_one_line_until_texts_part() -> None:
    snapshot = held(SessionStore(), TEXT, 32, 48)
    snapshot.grow([5] * 16)
    snapshot.grow([5] * 48)
    snapshot.grow([5] * 32)
    assert (list(snapshot.tail), snapshot.branches) == ([5] * 48, False)
    assert list(snapshot.key([9, 9])) == [0] * 48 + [9, 9]
    snapshot.grow([5] * 16 + [6] * 16)
    assert snapshot.branches
