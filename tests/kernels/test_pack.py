"""`pack_entries` and `commit_tables`: moves; bit-equal, and no other cell changes."""

import pytest
import torch

from sglang_kvc.kernels.decode_attention import decode_attention_ref
from sglang_kvc.kernels.layout import BlockTables, PassPlan
from sglang_kvc.kernels.pack import (
    commit_tables,
    commit_tables_ref,
    commit_tables_triton,
    pack_entries,
    pack_entries_ref,
    pack_entries_triton,
)
from sglang_kvc.kernels.select import (
    SelectedEntries,
    SelectionRule,
    select_entries_ref,
)
from sglang_kvc.kernels.testing import Case, make_case, make_plan
from tests.kernels import oracles
from tests.kernels.test_append import CELLS, bits

Pass = tuple[PassPlan, torch.Tensor, SelectedEntries, torch.Tensor]


def plan_pass(case: Case, fold_new: list[int] | None = None) -> Pass:
    """A plan, scores, survivors and fresh pages in shuffled order."""
    plan = make_plan(case, fold_new=fold_new)
    device, heads = case.arena.k.device, case.arena.heads_per_page
    scores = torch.rand(plan.num_entries, device=device)
    selected = select_entries_ref(case.tables, plan, scores, rule=SelectionRule(2))
    fresh = case.free_pages[: plan.num_kept // (16 * heads)]
    return plan, scores, selected, torch.tensor(fresh, dtype=torch.int64, device=device)


def copy(case: Case) -> Case:
    """A deep copy of what a pass changes."""
    return case._replace(
        arena=case.arena.clone(),
        tables=BlockTables(*(t.clone() for t in case.tables)),
    )


def assert_same_state(ours: Case, theirs: Case) -> None:
    """Every cell of arena and tables is bit-equal."""
    for name in CELLS:
        a, b = getattr(ours.arena, name), getattr(theirs.arena, name)
        assert torch.equal(bits(a), bits(b)), name
    for name in BlockTables._fields:
        a, b = getattr(ours.tables, name), getattr(theirs.tables, name)
        assert torch.equal(a, b), name


def check_twins(case: Case, fold_new: list[int] | None = None) -> None:
    """Run the pass with the kernels and with the references."""
    plan, scores, selected, fresh = plan_pass(case, fold_new)
    ours, theirs = copy(case), copy(case)
    pack_entries_triton(ours.arena, plan, selected, fresh)
    pack_entries_ref(theirs.arena, plan, selected, fresh)
    assert_same_state(ours, theirs)
    commit_tables_triton(ours.arena, ours.tables, plan, selected, fresh, scores)
    commit_tables_ref(theirs.arena, theirs.tables, plan, selected, fresh, scores)
    assert_same_state(ours, theirs)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("seq_lens", "folds", "fold_new", "dim", "dtype"),
    [
        ([1], [0], None, 64, torch.float32),
        ([15, 16, 17], [0, 0, 0], None, 64, torch.bfloat16),
        ([63, 100, 47], [0, 64, 0], None, 96, torch.float16),
        ([500, 141], [256, 128], None, 128, torch.bfloat16),
        # A tail of whole pages that do not compete.
        ([100, 60], [32, 0], [48, 16], 64, torch.float16),
    ],
)
def test_equals_reference(
    seq_lens: list[int],
    folds: list[int],
    fold_new: list[int] | None,
    dim: int,
    dtype: torch.dtype,
    device: str,
) -> None:
    case = make_case(
        seq_lens,
        folds,
        layers=2,
        kv_heads=3,
        group=1,
        head_dim=dim,
        dtype=dtype,
        device=device,
    )
    check_twins(case, fold_new)


@pytest.mark.parametrize("fold_new", [None, [96, 16, 32]])
def test_reference_against_entries(fold_new: list[int] | None) -> None:
    before = make_case([100, 30, 33], [64, 0, 32], layers=2, group=1, head_dim=16)
    plan, scores, selected, fresh = plan_pass(before, fold_new)
    after = copy(before)
    pack_entries(after.arena, plan, selected, fresh)
    commit_tables(after.arena, after.tables, plan, selected, fresh, scores)
    folds = plan.fold_new.tolist()
    assert [int(after.tables.fold_lens[slot]) for slot in after.slots] == folds
    after = after._replace(folds=folds)

    old_keys, keys = (c.arena.k.view(-1, 16) for c in (before, after))
    old_values, values = (c.arena.v.view(-1, 16) for c in (before, after))
    kept = 0
    for r in range(3):
        for lh in range(4):
            rows = [row for row, p in oracles.entries(after, r, lh) if p < 0]
            source = selected.source_rows[kept : kept + len(rows)].long()
            assert torch.equal(keys[rows], old_keys[source])
            assert torch.equal(values[rows], old_values[source])
            stored = after.arena.score.view(-1)[rows]
            assert torch.equal(stored, selected.scores[kept : kept + len(rows)])
            kept += len(rows)
    assert kept == plan.num_kept

    # The tail's scores come from the workspace; the rest of the old cells is as it was.
    start = 0
    expected = before.arena.score.clone().view(-1)
    for r in range(3):
        for lh in range(4):
            for row, position in oracles.entries(before, r, lh):
                if position >= folds[r]:
                    expected[row] = scores[start]
                start += 1
            start += -(before.seq_lens[r] - before.folds[r]) % 16
    written = torch.zeros(after.arena.k.shape[0], dtype=torch.bool)
    written[fresh] = True
    expected = expected.view_as(after.arena.score)
    assert torch.equal(after.arena.score[~written], expected[~written])
    assert torch.equal(bits(after.arena.k[~written]), bits(before.arena.k[~written]))


def test_keeping_everything_changes_no_attention() -> None:
    before = make_case([100, 37], [64, 0], layers=2, group=2, head_dim=32)
    held = [before.packed_pages[0] + 2, 2]
    plan = make_plan(before, keep_pages=held)
    scores = torch.rand(plan.num_entries)
    selected = select_entries_ref(before.tables, plan, scores, rule=SelectionRule(0))
    fresh = torch.tensor(before.free_pages[: sum(held)])
    after = copy(before)
    pack_entries(after.arena, plan, selected, fresh)
    commit_tables(after.arena, after.tables, plan, selected, fresh, scores)
    q = torch.randn(2, 4, 32)
    slots, seq_lens = torch.tensor(before.slots), torch.tensor(before.seq_lens)
    for layer in range(2):
        outs = [
            decode_attention_ref(
                c.arena, c.tables, q, slots, seq_lens, layer=layer, sm_scale=0.2
            )
            for c in (before, after)
        ]
        torch.testing.assert_close(*outs)


@pytest.mark.gpu
def test_gpu_long_first_pass(device: str) -> None:
    check_twins(
        make_case(
            [20_000, 3000],
            [0, 2048],
            layers=32,
            group=1,
            head_dim=128,
            dtype=torch.bfloat16,
            device=device,
            skew=4.0,
        )
    )
