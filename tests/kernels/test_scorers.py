"""`key_diff`: arithmetic."""

from collections.abc import Callable

import pytest
import torch

from sglang_kvc.kernels.key_diff import (
    key_diff,
    key_diff_ref,
    key_diff_triton,
)
from sglang_kvc.kernels.testing import Case, make_case, make_plan
from tests.kernels import oracles

# seq_lens, folds, layers, KV heads, head_dim, dtype
SMALL = [
    ([1], [0], 1, 1, 16, torch.float32),
    ([15, 16, 17], [0, 0, 0], 1, 3, 64, torch.float32),
    ([63, 100], [0, 64], 2, 1, 80, torch.float16),
    # No tail, and heads that hold nothing.
    ([64, 48], [64, 48], 3, 2, 96, torch.bfloat16),
    ([100, 37, 200], [48, 0, 96], 1, 5, 128, torch.bfloat16),
    ([1100, 30], [128, 0], 1, 1, 80, torch.float16),
]
LARGE = [
    ([20_000], [0], 4, 2, 128, torch.bfloat16),
    ([3000, 700, 40], [2048, 0, 32], 3, 2, 80, torch.bfloat16),
    ([2500, 9000], [0, 4096], 1, 3, 64, torch.bfloat16),
]
AXES = ("seq_lens", "folds", "layers", "heads", "dim", "dtype")
NEAR = {"rtol": 2e-6, "atol": 1e-6}
Shape = tuple[list[int], list[int], int, int, int, torch.dtype]


def build(shape: Shape, device: str) -> Case:
    seq_lens, folds, layers, heads, dim, dtype = shape
    case = make_case(
        # Every request is made with a tail, which is cut off again.
        [max(n, fold + 1) for n, fold in zip(seq_lens, folds, strict=True)],
        folds,
        layers=layers,
        kv_heads=heads,
        group=1,
        head_dim=dim,
        skew=4.0,
        dtype=dtype,
        device=device,
        # Lanes without an entry point there: they must not read it.
        poison_padding=True,
    )
    return case._replace(seq_lens=seq_lens)


def workspace(
    case: Case, head_scores: Callable[[int, int, list[int]], torch.Tensor]
) -> torch.Tensor:
    """Lay out what `head_scores` of (r, lh, arena rows) gives: float64, padding 0."""
    parts = []
    for r in range(len(case.slots)):
        padding = (case.folds[r] - case.seq_lens[r]) % 16
        for lh in range(case.arena.heads_per_page):
            rows = [row for row, _ in oracles.entries(case, r, lh)]
            own = head_scores(r, lh, rows)
            parts += [own.double(), own.new_zeros(padding).double()]
    return torch.cat(parts)


def padding(case: Case) -> torch.Tensor:
    """Whether a cell of the workspace is no entry, [plan.num_entries] bool."""
    device = case.arena.k.device
    return workspace(case, lambda r, lh, rows: torch.ones(len(rows)).to(device)) == 0


def key_diff_truth(case: Case) -> torch.Tensor:
    keys = case.arena.k.view(-1, case.arena.head_dim)

    def head_scores(r: int, lh: int, rows: list[int]) -> torch.Tensor:
        key = keys[rows].double()
        anchor = sum((k / k.dot(k).sqrt() for k in key), key.new_zeros(key.shape[1]))
        return 1 - key @ anchor / (key.norm(dim=1) * anchor.norm())

    return workspace(case, head_scores)


def check_arithmetic(
    case: Case, found: torch.Tensor, ref: torch.Tensor, truth: torch.Tensor
) -> None:
    for scores in (found, ref):
        assert (scores >= 0).all()
        assert (scores[padding(case)] == 0).all()
    oracles.assert_arith(found, ref, truth)


def check_all(case: Case) -> None:
    """Compare every kernel with its reference and both with the truth."""
    plan = make_plan(case)
    args = (case.arena, case.tables, plan)
    found = key_diff_triton(*args)
    ref = key_diff_ref(*args)
    check_arithmetic(case, found, ref, key_diff_truth(case))


@pytest.mark.interpreter
@pytest.mark.parametrize(AXES, SMALL)
def test_close_to_truth(
    seq_lens: list[int],
    folds: list[int],
    layers: int,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    device: str,
) -> None:
    check_all(build((seq_lens, folds, layers, heads, dim, dtype), device))


@pytest.mark.gpu
@pytest.mark.parametrize(AXES, LARGE)
def test_gpu_sizes(
    seq_lens: list[int],
    folds: list[int],
    layers: int,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    device: str,
) -> None:
    check_all(build((seq_lens, folds, layers, heads, dim, dtype), device))


@pytest.mark.parametrize("shape", SMALL[:5])
def test_references_against_loops(shape: Shape) -> None:
    case = build(shape, "cpu")
    plan = make_plan(case)
    args = (case.arena, case.tables, plan)
    scores = key_diff(*args)
    torch.testing.assert_close(scores.double(), key_diff_truth(case), **NEAR)


@pytest.mark.interpreter
@pytest.mark.parametrize("programs", [2, 3])
def test_heads_are_shared_by_programs(
    programs: int, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """More tiles than programs, and programs without a tile."""
    name = "sglang_kvc.kernels.plan_heads.programs_per_head"
    monkeypatch.setattr(name, lambda rows, items: programs)
    check_all(
        make_case([450, 20], [64, 0], layers=1, group=1, head_dim=64, device=device)
    )


@pytest.mark.interpreter
def test_launches_are_chunked(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    case = make_case(
        [50, 33, 80], [32, 0, 32], layers=1, group=1, head_dim=64, device=device
    )
    args = (case.arena, case.tables, make_plan(case))
    whole = key_diff_triton(*args)
    monkeypatch.setattr("sglang_kvc.kernels.plan_heads.MAX_PARTIAL", 1)
    assert torch.equal(key_diff_triton(*args), whole)


@pytest.mark.interpreter
def test_extreme_keys_have_a_cosine(device: str) -> None:
    """A key of length 0 has none with the anchor; equal and opposite ones are 0, 2."""
    case = make_case([24], layers=1, kv_heads=1, group=1, head_dim=64, device=device)
    rows = [row for row, _ in oracles.entries(case, 0, 0)]
    keys = case.arena.k.view(-1, 64)
    keys[rows] = keys[rows[1]].clone()
    keys[rows[5]] *= -1000
    keys[rows[7]] = 0
    expected = torch.zeros(32, device=device)
    expected[5], expected[7] = 2, 1
    args = (case.arena, case.tables, make_plan(case))
    for op in (key_diff_triton, key_diff_ref):
        scores = op(*args)
        assert (scores >= 0).all()
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)
        assert scores[7] == 1
    # An anchor of length 0: every cosine is 0.
    keys[rows] = 0
    for op in (key_diff_triton, key_diff_ref):
        assert op(*args).tolist() == [1.0] * 24 + [0.0] * 8
