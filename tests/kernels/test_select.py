"""`select_entries`: indices, so equality, ties included."""

import pytest
import torch

from sglang_kvc.kernels.layout import PAGE_SIZE, PassPlan
from sglang_kvc.kernels.select import (
    SelectedEntries,
    SelectionRule,
    select_entries,
    select_entries_ref,
    select_entries_triton,
)
from sglang_kvc.kernels.testing import Case, make_case, make_plan
from tests.kernels import oracles


def make_scores(entries: int, levels: int, device: str) -> torch.Tensor:
    """Random scores: skewed towards 0, or one of `levels` values."""
    generator = torch.Generator(device).manual_seed(entries)
    scores = torch.rand(entries, generator=generator, device=device)
    return (scores * levels).floor() / levels if levels else scores**8


def check_equal(
    case: Case, plan: PassPlan, scores: torch.Tensor, rule: SelectionRule
) -> SelectedEntries:
    """Kernel and reference: same survivors, same scores, same offsets."""
    ours = select_entries_triton(case.tables, plan, scores, rule=rule)
    theirs = select_entries_ref(case.tables, plan, scores, rule=rule)
    for name in SelectedEntries._fields:
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    return ours


CASES = [
    # seq_lens, folds, pages kept, protected, sinks
    ([16], [0], [1], 0, 0),
    ([17], [0], [0], 0, 0),
    ([63, 100, 47], [0, 64, 0], [2, 3, 1], 8, 0),
    ([500, 140], [256, 128], [9, 3], 5, 3),
    ([333, 15, 200], [160, 0, 0], [4, 0, 12], 32, 4),
    # An answer that stays: most of a tail, and more than all of another.
    ([500, 140], [256, 128], [9, 3], 150, 4),
    # More is evicted than unforced entries allow.
    ([128], [0], [1], 40, 20),
]


@pytest.mark.interpreter
@pytest.mark.parametrize(("seq_lens", "folds", "keep", "protected", "sinks"), CASES)
@pytest.mark.parametrize("levels", [0, 3])
def test_equals_reference(
    seq_lens: list[int],
    folds: list[int],
    keep: list[int],
    protected: int,
    sinks: int,
    levels: int,
    device: str,
) -> None:
    case = make_case(seq_lens, folds, layers=2, group=1, head_dim=16, device=device)
    plan = make_plan(case, keep, protected=protected)
    scores = make_scores(plan.num_entries, levels, device)
    check_equal(case, plan, scores, SelectionRule(sinks))


def as_lists(selected: SelectedEntries) -> oracles.Survivors:
    return oracles.Survivors._make(part.tolist() for part in selected)


GROUP_CASES = [
    # seq_lens, folds, packed pages, pages kept; heads hold equally many blocks.
    ([63, 130, 47], [0, 0, 0], [0, 0, 0], [2, 3, 1]),
    ([500, 140], [256, 128], [4, 8], [9, 3]),
]


GroupCase = tuple[list[int], list[int], list[int], list[int]]


def select_by_all(
    shape: GroupCase,
    worthless: int,
    levels: int,
    device: str,
    *,
    spare: float = 0.0,
    bound_groups: int = 0,
    **options: int,
) -> tuple[SelectedEntries, PassPlan]:
    """Kernel, reference and literal algorithm agree on three layers of two heads.

    `worthless`: first heads of the second request that nobody would keep anything of.
    """
    seq_lens, folds, packed, keep = shape
    case = make_case(
        seq_lens,
        folds,
        layers=3,
        group=1,
        head_dim=16,
        packed_pages=packed,
        skew=0,
        device=device,
    )
    plan = make_plan(case, keep, spare=spare)
    scores = make_scores(plan.num_entries, levels, device)
    first = int(plan.entry_base[1])
    held = 16 * (packed[1] + int(plan.tail_blocks[1]))
    scores[first : first + worthless * held] = 0
    rule = SelectionRule(2, bound_groups=bound_groups, **options)
    selected = check_equal(case, plan, scores, rule)
    fold_new = [n // PAGE_SIZE * PAGE_SIZE for n in seq_lens]
    bounds = (bound_groups, plan.evict_most.tolist()) if bound_groups else None
    survivors = oracles.select(
        case, scores, fold_new, keep, 8, 2, bounds=bounds, **options
    )
    assert as_lists(selected) == survivors
    return selected, plan


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", GROUP_CASES)
@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("floor_blocks", [0, 1])
@pytest.mark.parametrize("levels", [0, 3])
def test_groups_and_floors(
    shape: GroupCase, groups: int, floor_blocks: int, levels: int, device: str
) -> None:
    """Joint, by layer, by head: every group keeps its share, every head its floor."""
    *_, keep = shape
    options = {"groups": groups, "floor_blocks": floor_blocks}
    selected, _ = select_by_all(shape, 1, levels, device, **options)
    left = selected.block_offsets.diff(dim=1)
    assert left.min() >= min(floor_blocks, *keep)
    by_group = left.unflatten(1, (groups, -1)).sum(2)
    assert (by_group == torch.tensor(keep, device=device)[:, None] * 6 // groups).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", GROUP_CASES)
@pytest.mark.parametrize(
    ("groups", "floor_blocks", "spare"), [(1, 0, 0.4), (1, 0, 1), (1, 1, 0), (3, 0, 1)]
)
@pytest.mark.parametrize("levels", [0, 3])
def test_bounded_groups(
    shape: GroupCase,
    groups: int,
    floor_blocks: int,
    spare: float,
    levels: int,
    device: str,
) -> None:
    """Heads compete freely, but no layer loses more than it may."""
    seq_lens, folds, packed, keep = shape
    options = {"groups": groups, "floor_blocks": floor_blocks, "bound_groups": 3}
    selected, plan = select_by_all(shape, 2, levels, device, spare=spare, **options)
    held = torch.tensor(packed) + torch.tensor(seq_lens) // PAGE_SIZE
    held -= torch.tensor(folds) // PAGE_SIZE
    by_layer = selected.block_offsets.diff(dim=1).unflatten(1, (3, 2)).sum(2).cpu()
    least = 2 * held - plan.evict_most.cpu() // 3
    assert (by_layer >= least[:, None]).all()
    if groups == 1 and spare < 1:
        assert by_layer[1, 0] == least[1]
    assert int(by_layer.sum()) == 6 * sum(keep)


@pytest.mark.interpreter
def test_ties_are_dealt_across_scan_blocks(device: str) -> None:
    case = make_case([32], layers=67, kv_heads=1, group=1, head_dim=8, device=device)
    plan = make_plan(case, [1], protected=0)
    # 67 blocks go: 60 of heads 0 to 29, then 7 of the 10 tied ones of heads 62 to 66.
    scores = torch.full((67, 32), 2.0, device=device)
    scores[:30] = 0.0
    scores[62:] = 1.0
    selected = check_equal(case, plan, scores.view(-1), SelectionRule(0))
    left = selected.block_offsets[0].diff().tolist()
    assert left == [0] * 30 + [2] * 32 + [0, 0, 0, 1, 2]


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("layers", "seq_len", "keep"),
    [(67, 40, 1), (1, 1100, 9), (1, 4500, 9)],
    ids=["heads", "entries", "long heads"],
)
def test_more_than_one_block_of_a_scan(
    layers: int, seq_len: int, keep: int, device: str
) -> None:
    case = make_case(
        [seq_len], layers=layers, kv_heads=1, group=1, head_dim=8, device=device
    )
    plan = make_plan(case, [keep], protected=0)
    # Far apart magnitudes reach every digit, 0 and the smallest subnormals included.
    scores = 10.0 ** -(torch.rand(plan.num_entries, device=device) * 44)
    scores[::7] = 0.0
    check_equal(case, plan, scores, SelectionRule(1))


@pytest.mark.parametrize(("seq_lens", "folds", "keep", "protected", "sinks"), CASES)
@pytest.mark.parametrize("levels", [0, 1, 4])
def test_reference_against_literal_algorithm(
    seq_lens: list[int],
    folds: list[int],
    keep: list[int],
    protected: int,
    sinks: int,
    levels: int,
) -> None:
    case = make_case(seq_lens, folds, layers=3, group=1, head_dim=8)
    plan = make_plan(case, keep, protected=protected)
    scores = make_scores(plan.num_entries, levels, "cpu")
    selected = select_entries(case.tables, plan, scores, rule=SelectionRule(sinks))
    fold_new = [n // PAGE_SIZE * PAGE_SIZE for n in seq_lens]
    survivors = oracles.select(case, scores, fold_new, keep, protected, sinks)
    assert as_lists(selected) == survivors


def test_what_is_forced_stays() -> None:
    case = make_case([160], [0], layers=1, group=1, head_dim=8)
    plan = make_plan(case, [2], protected=5)
    scores = torch.ones(plan.num_entries)
    for head in range(2):
        scores[head * 160 : head * 160 + 3] = 0
        scores[head * 160 + 155 : head * 160 + 160] = 0
    rule = SelectionRule(sinks=3)
    rows = select_entries(case.tables, plan, scores, rule=rule).source_rows.tolist()
    for head in range(2):
        held = [row for row, _ in oracles.entries(case, 0, head)]
        assert set(held[:3] + held[-5:]) <= set(rows)


def long_case(device: str) -> Case:
    """Compressed and first passes, skewed, 64 heads."""
    return make_case(
        [20_000, 6000, 3000],
        [0, 4096, 2048],
        layers=32,
        group=1,
        head_dim=16,
        skew=4.0,
        device=device,
        spare_pages=0,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("levels", [0, 5])
def test_gpu_long(levels: int, device: str) -> None:
    case = long_case(device)
    plan = make_plan(case, [128, 64, 100], protected=32)
    scores = make_scores(plan.num_entries, levels, device)
    check_equal(case, plan, scores, SelectionRule(4))


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 32, 64])
def test_gpu_groups(groups: int, device: str) -> None:
    lengths = [20_000, 6000, 3000]
    case = make_case(
        lengths, layers=32, group=1, head_dim=16, device=device, spare_pages=0
    )
    plan = make_plan(case, [128, 64, 100], protected=32)
    scores = make_scores(plan.num_entries, 0, device)
    check_equal(case, plan, scores, SelectionRule(4, groups, floor_blocks=3))
