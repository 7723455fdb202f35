"""`recency_scores` (one division) and `random_scores` (integers): bit-equal; and what
they keep over two passes.
"""

import pytest
import torch

from sglang_kvc.kernels.pack import commit_tables, pack_entries
from sglang_kvc.kernels.positional import (
    random_scores,
    random_scores_ref,
    random_scores_triton,
    recency_scores,
    recency_scores_ref,
    recency_scores_triton,
)
from sglang_kvc.kernels.select import SelectionRule, select_entries
from sglang_kvc.kernels.testing import Case, make_case, make_plan
from tests.kernels import oracles
from tests.kernels.test_scorers import AXES, LARGE, SMALL, Shape, build, workspace


def mix(x: int) -> int:
    """The hash of ``positional`` in unbounded integers."""
    x = (x ^ x >> 15) * 0x2C1B3C6D % 2**32
    x = (x ^ x >> 12) * 0x297A2D39 % 2**32
    return x ^ x >> 15


def draw(seed: int, slot: int, seq_len: int, lh: int, position: int) -> float:
    key = mix(mix(mix(mix(seed) ^ slot) ^ seq_len) ^ lh)
    return (mix(position ^ key) // 512 + 0.5) / 2**23


def random_truth(case: Case, seed: int) -> torch.Tensor:
    stored = case.arena.score.view(-1).tolist()

    def head_scores(r: int, lh: int, rows: list[int]) -> torch.Tensor:
        slot, seq_len = case.slots[r], case.seq_lens[r]
        score = []
        for i, row in enumerate(rows):
            drawn = draw(seed, slot, seq_len, lh, seq_len - len(rows) + i)
            kept = case.folds[r] > 0 and stored[row] > 0
            score.append(stored[row] if kept else drawn)
        return torch.tensor(score, dtype=torch.float64, device=case.arena.k.device)

    return workspace(case, head_scores)


def recency_truth(case: Case) -> torch.Tensor:
    device = case.arena.k.device
    return workspace(
        case,
        lambda r, lh, rows: torch.tensor(
            [1 / (len(rows) - i) for i in range(len(rows))],
            dtype=torch.float64,
            device=device,
        ),
    )


def half_drawn(case: Case) -> Case:
    """Every third stored score is 0, as where no pass has drawn one."""
    score = case.arena.score.clone()
    score.view(-1)[::3] = 0
    return case._replace(arena=case.arena._replace(score=score))


def check_all(case: Case) -> None:
    """Compare both kernels with their references and with the truth."""
    plan = make_plan(case)
    args = (case.arena, case.tables, plan)
    found = recency_scores_triton(*args)
    assert torch.equal(found, recency_scores_ref(*args))
    assert torch.equal(found, recency_truth(case).float())

    case = half_drawn(case)
    args, seed = (case.arena, case.tables, plan), 2**31 - 1
    found = random_scores_triton(*args, seed=seed)
    assert torch.equal(found, random_scores_ref(*args, seed=seed))
    assert torch.equal(found, random_truth(case, seed).float())


@pytest.mark.interpreter
@pytest.mark.parametrize(AXES, SMALL)
def test_equal_to_truth(
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
    scores = recency_scores(case.arena, case.tables, plan)
    assert torch.equal(scores, recency_truth(case).float())
    case = half_drawn(case)
    scores = random_scores(case.arena, case.tables, plan, seed=5)
    assert torch.equal(scores, random_truth(case, 5).float())


@pytest.mark.interpreter
def test_heads_are_shared_by_programs(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """More tiles than programs, and programs without a tile."""
    name = "sglang_kvc.kernels.positional.programs_per_head"
    monkeypatch.setattr(name, lambda rows, items: 2)
    check_all(
        make_case([2700, 20], [64, 0], layers=1, group=1, head_dim=16, device=device)
    )


def run_pass(case: Case, keep: int, name: str, sinks: int, groups: int) -> None:
    """One pass over all whole pages of `case`, with the op `name`; then its tables."""
    plan = make_plan(case, keep_pages=[keep], protected=0)
    if name == "recency":
        scores = recency_scores(case.arena, case.tables, plan)
    else:
        scores = random_scores(case.arena, case.tables, plan, seed=3)
    rule = SelectionRule(sinks, groups)
    selected = select_entries(case.tables, plan, scores, rule=rule)
    pages = [case.free_pages.pop() for _ in range(keep)]
    pages = torch.tensor(pages, device=scores.device)
    pack_entries(case.arena, plan, selected, pages)
    commit_tables(case.arena, case.tables, plan, selected, pages, scores)


def two_passes(name: str, sinks: int, groups: int) -> tuple[Case, list[list]]:
    """At 101 tokens keep 3 pages a head, at 200 then 4: what each head holds.

    Entries are (position, stored score); a value's first element is its position.
    """
    case = make_case([200], layers=1, kv_heads=3, group=1, head_dim=16)
    case.arena.score.zero_()
    values = case.arena.v.view(-1, 16)
    for lh in range(3):
        for row, position in oracles.entries(case, 0, lh):
            values[row, 0] = position
    run_pass(case._replace(seq_lens=[101]), 3, name, sinks, groups)
    case = case._replace(folds=[96], packed_pages=[3])
    run_pass(case, 4, name, sinks, groups)
    case = case._replace(folds=[192], packed_pages=[4])
    score = case.arena.score.view(-1)
    held = []
    for lh in range(3):
        rows = [row for row, _ in oracles.entries(case, 0, lh)]
        held.append([(int(values[row, 0]), float(score[row])) for row in rows])
    return case, held


@pytest.mark.parametrize("groups", [1, 3])
def test_recency_keeps_sinks_and_the_latest(groups: int) -> None:
    _, held = two_passes("recency", sinks=2, groups=groups)
    kept = [0, 1, *range(130, 192), *range(192, 200)]
    assert [[position for position, _ in head] for head in held] == [kept] * 3


def test_random_keeps_a_uniform_sample() -> None:
    """The highest of all draws, each made by the first pass that saw the entry."""
    case, held = two_passes("random", sinks=0, groups=3)
    for lh, head in enumerate(held):
        draws = [
            (draw(3, case.slots[0], 101 if p < 101 else 200, lh, p), p)
            for p in range(200)
        ]
        best = sorted(draws[:192])[-64:] + draws[192:]
        assert sum(p < 96 for _, p in best) < 48, "the first pass kept too few"
        assert head == sorted((p, score) for score, p in best)


def test_the_next_request_of_a_slot_draws_otherwise() -> None:
    case = make_case([64], layers=1, kv_heads=1, group=1, head_dim=16)
    draws = []
    for seq_len in (63, 64):
        plan = make_plan(case._replace(seq_lens=[seq_len]))
        draws.append(random_scores(case.arena, case.tables, plan, seed=0)[:63])
    assert (draws[0] != draws[1]).all()


def test_draws_are_uniform_and_unrelated() -> None:
    case = make_case([4096, 4096], layers=2, kv_heads=4, group=1, head_dim=16)
    plan = make_plan(case)
    draws, again = (
        random_scores(case.arena, case.tables, plan, seed=seed).view(16, 4096)
        for seed in (0, 1)
    )
    assert draws.min() > 0
    assert draws.max() < 1
    # Kolmogorov's distance, 65536 draws: 1.63 / 256 is exceeded once in a hundred.
    rank = torch.arange(1, draws.numel() + 1) / draws.numel()
    assert (draws.flatten().sort().values - rank).abs().max() < 1.63 / 256
    # Over heads, requests, seeds and neighbours; five standard deviations of 4096.
    rows = torch.cat([draws, again, draws.roll(1, 1), draws.roll(16, 1)])
    related = torch.corrcoef(rows).fill_diagonal_(0)
    assert related.abs().max() < 5 / 64


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_bad_seeds_are_named(seed: int) -> None:
    case = make_case([20], layers=1, kv_heads=1, group=1, head_dim=16)
    message = rf"seed must be in \[0, 2147483648\), got {seed}"
    with pytest.raises(ValueError, match=message):
        random_scores(case.arena, case.tables, make_plan(case), seed=seed)
