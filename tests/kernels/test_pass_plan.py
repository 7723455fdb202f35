"""`build_plan`: host arithmetic."""

import pytest

from sglang_kvc.kernels.layout import PassPlan, PlannedRequest
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
        "evict_pages": 3,
        "evict_most_pages": 5,
        "protected": 27,
        "is_first": False,
        "repeated": True,
        "pool_tail": False,
    }
    return PassRequest(**{**fields, **changes})


def test_layout_of_two_requests() -> None:
    first = request(
        slot=1,
        seq_len=40,
        fold_old=0,
        fold_new=32,
        packed_pages=0,
        evict_pages=1,
        evict_most_pages=1,
        is_first=True,
        pool_tail=True,
    )
    plan = build_plan([first, request()], 6, "cpu")
    assert plan.tail_blocks.tolist() == [3, 4]
    assert plan.fold_blocks.tolist() == [2, 3]
    assert plan.evict_blocks.tolist() == [6, 18]
    assert plan.evict_most.tolist() == [6, 30]
    assert plan.is_first.tolist() == [1, 0]
    assert plan.pool_tail.tolist() == [1, 0]
    assert plan.entry_base.tolist() == [0, 16 * 6 * 3]
    assert plan.keep_base.tolist() == [0, 16 * 6 * 1]
    assert plan.num_entries == 16 * 6 * (3 + 4 + 4)
    assert plan.num_kept == 16 * 6 * (1 + 4)
    # A head cannot hold more packed blocks than were folded: 8, though 24 exist.
    assert plan.max_blocks == 8 + 4


def test_a_planned_request_is_a_column_of_the_plan() -> None:
    plan = build_plan([request(slot=1), request()], 6, "cpu")
    names = [name.removesuffix("s") for name in PassPlan._fields]
    fields = [name.removesuffix("s") for name in PlannedRequest._fields]
    assert names[: len(fields)] == fields
    for r, planned in enumerate(plan.requests()):
        assert list(planned) == [int(vector[r]) for vector in plan[: len(fields)]]


def test_totals_match_the_entries_of_a_case() -> None:
    case = make_case(
        [100, 33, 16], [64, 0, 0], layers=2, kv_heads=3, group=1, head_dim=8
    )
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
        (
            {"evict_pages": -1},
            "0 <= evict_pages <= evict_most_pages <= 7, .* got -1 and 5",
        ),
        ({"evict_pages": 6}, "got 6 and 5"),
        ({"evict_most_pages": 2}, "got 3 and 2"),
        ({"evict_most_pages": 8}, "got 3 and 8"),
    ],
)
def test_impossible_passes_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        request(**changes)


def test_an_empty_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one request"):
        build_plan([], 6, "cpu")
