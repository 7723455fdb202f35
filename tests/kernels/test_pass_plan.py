"""`build_plan`: host arithmetic."""

import pytest

from sglang_kvc.kernels.pass_plan import PassRequest, build_plan
from sglang_kvc.kernels.testing import make_case, make_plan
from tests.kernels import oracles


def request(**changes: int) -> PassRequest:
    """A periodic pass of 4 + 3 pages down to 4, with `changes`."""
    fields = {
        "slot": 3,
        "seq_len": 181,
        "fold_old": 128,
        "fold_new": 176,
        "query_start": 149,
        "packed_pages": 4,
        "evict_blocks": 3 * 6,
        "evict_most": 5 * 6,
        "protected": 27,
        "is_first": False,
        "repeated": True,
        "pool_tail": False,
        "recorded": False,
    }
    return PassRequest(**{**fields, **changes})


def test_layout_of_two_requests() -> None:
    first = request(
        slot=1,
        seq_len=40,
        fold_old=0,
        fold_new=32,
        packed_pages=0,
        evict_blocks=6,
        evict_most=6,
        is_first=True,
        pool_tail=True,
    )
    plan = build_plan([first, request(recorded=True)], 6, "cpu")
    assert plan.tail_blocks.tolist() == [3, 4]
    assert plan.fold_blocks.tolist() == [2, 3]
    assert plan.is_first.tolist() == [1, 0]
    assert plan.pool_tail.tolist() == [1, 0]
    assert plan.recorded.tolist() == [0, 1]
    assert not plan.all_recorded
    assert plan.entry_base.tolist() == [0, 16 * 6 * 3]
    assert plan.keep_base.tolist() == [0, 16 * 6 * 1]
    assert plan.num_entries == 16 * 6 * (3 + 4 + 4)
    assert plan.num_kept == 16 * 6 * (1 + 4)
    # A head cannot hold more packed blocks than were folded: 8, though 24 exist.
    assert plan.max_blocks == 8 + 4


def test_totals_match_the_entries_of_a_case() -> None:
    case = make_case(3, 2, 3, 1, 8, [100, 33, 16], [64, 0, 0])
    plan = make_plan(case)
    padded = [-(-n // 16) * 16 for n in case.seq_lens]
    total = sum(
        len(oracles.entries(case, r, lh)) + padded[r] - case.seq_lens[r]
        for r in range(3)
        for lh in range(6)
    )
    assert plan.num_entries == total


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fold_new": 170}, "multiples of 16, got 128 and 170"),
        ({"fold_new": 192}, "fold_new <= seq_len, got 128, 192, 181"),
        ({"evict_blocks": 7}, "whole pages of 6 blocks out of 7, got 7"),
        ({"evict_blocks": 48}, "out of 7, got 48"),
        ({"evict_most": 31}, "evict_most must be whole pages of 6 blocks"),
        ({"evict_most": 12}, "18 blocks or more out of 7 pages, got 12"),
        ({"evict_most": 48}, "out of 7 pages, got 48"),
    ],
)
def test_impossible_passes_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_plan([request(**changes)], 6, "cpu")


def test_an_empty_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one request"):
        build_plan([], 6, "cpu")
