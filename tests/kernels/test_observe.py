"""`observe_scores`: arithmetic."""

from typing import Any

import pytest
import torch

from sglang_kvc.kernels import observe
from sglang_kvc.kernels.layout import PassPlan
from sglang_kvc.kernels.observe import (
    ObserveConfig,
    observe_scores,
    observe_scores_ref,
    observe_scores_triton,
)
from sglang_kvc.kernels.query_lse import query_lse
from sglang_kvc.kernels.testing import Case, fill_ring, make_case, make_plan
from tests.kernels import oracles
from tests.kernels.test_scorers import workspace

HOW = {"sm_scale": 0.125, "power": 2}


def observed(
    case: Case, plan: PassPlan, **how: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the kernel, and the log-sum-exps that it works with."""
    taken = []

    def noted(*args: Any, **sizes: Any) -> torch.Tensor:
        taken.append(query_lse(*args, **sizes))
        return taken[-1]

    args = (case.arena, case.tables, plan, case.query_ring)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observe, "query_lse", noted)
        scores = observe_scores_triton(*args, group=case.group, **how)
    (lse,) = taken
    return scores, lse


def check(
    case: Case,
    power: int,
    query_start: int = 0,
    value_norms: bool = False,
) -> None:
    """Compare the kernel with float64 and with torch at the model's dtype."""
    arena = case.arena
    starts = [query_start] * len(case.slots)
    plan = make_plan(case, query_start=starts)
    scale = arena.head_dim**-0.5
    how = {"sm_scale": scale, "power": power, "value_norms": value_norms}
    out, lse = observed(case, plan, **how)
    sums = oracles.query_lse(case, scale, query_start).float()
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, sums, atol=1e-3, rtol=0)
    truth = oracles.observe(case, scale, power, query_start, value_norms=value_norms)
    if arena.k.dtype == torch.float32:
        args = (arena, case.tables, plan, case.query_ring)
        working = observe_scores_ref(*args, group=case.group, **how)
    else:
        working = oracles.observe(
            case, scale, power, query_start, arena.k.dtype, value_norms
        )
    oracles.assert_arith(out, working.float(), truth)
    assert (out[truth == 0] == 0).all()


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("seq_lens", "folds", "layers", "heads", "group", "dim", "window", "dtype"),
    [
        ([1], [0], 1, 1, 1, 64, 8, torch.float32),
        ([15, 16, 17], [0, 0, 0], 1, 2, 3, 64, 8, torch.float32),
        ([63, 100], [0, 64], 2, 1, 4, 96, 8, torch.float16),
        ([100], [48], 1, 2, 7, 128, 8, torch.float16),
        ([200, 70], [96, 0], 1, 1, 8, 64, 32, torch.float32),
        ([500], [256], 1, 1, 3, 128, 16, torch.float16),
        # More queries than a program holds, and wide ones.
        ([150, 40], [64, 0], 1, 1, 16, 128, 32, torch.float16),
        ([150], [64], 1, 1, 5, 256, 32, torch.float16),
        ([90], [48], 1, 1, 3, 80, 16, torch.float16),
        # Four splits; in the short request, early rows see nothing of a late split.
        ([2100, 60], [0, 0], 1, 1, 1, 64, 40, torch.float32),
    ],
)
def test_close_to_truth(
    seq_lens: list[int],
    folds: list[int],
    layers: int,
    heads: int,
    group: int,
    dim: int,
    window: int,
    dtype: torch.dtype,
    device: str,
) -> None:
    case = make_case(
        seq_lens,
        folds,
        layers=layers,
        kv_heads=heads,
        group=group,
        head_dim=dim,
        dtype=dtype,
        device=device,
        window=window,
        # Lanes without an entry point there: they must not read it.
        poison_padding=True,
    )
    check(case, power=1 if dim == 128 else 2)
    check(case, power=2, value_norms=True)


@pytest.mark.interpreter
def test_only_new_queries_count(device: str) -> None:
    case = make_case(
        [84], [64], layers=1, group=2, head_dim=64, device=device, window=16
    )
    check(case, power=2, query_start=79)


@pytest.mark.interpreter
def test_a_query_that_sees_nothing_scores_nothing(device: str) -> None:
    """Head 0 kept nothing, and most queries are older than its tail."""
    case = make_case(
        [33, 66],
        [32, 64],
        layers=1,
        group=2,
        head_dim=64,
        packed_pages=[2, 3],
        device=device,
    )
    case.tables.block_offsets[case.slots, 1] = 0
    assert oracles.query_lse(case, 0.125)[:, 0].isinf().any()
    check(case, power=1)
    check(case, power=2, value_norms=True)


def with_large_logits(case: Case) -> Case:
    """Some dimensions of keys and queries are large, and the same in all.

    So logits are 17,890 on the scale of log2, and differ by some tens.
    """
    keys = case.arena.k
    keys[..., -4:].masked_fill_(~keys[..., -4:].isnan(), 200.0)
    generator = torch.Generator(keys.device).manual_seed(1)
    queries = case.queries.float().normal_(0, 8, generator=generator)
    queries[..., -4:] = 124.0
    return case._replace(query_ring=fill_ring(queries, case.arena, generator))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_logits(dtype: torch.dtype, device: str) -> None:
    """fp16 would round their log-sum-exps to multiples of 16."""
    shape = {"layers": 1, "kv_heads": 2, "group": 1, "head_dim": 64}
    case = with_large_logits(
        make_case([130, 75], [64, 0], **shape, dtype=dtype, device=device)
    )
    values = case.arena.v.double().view(-1, 64)
    sums = oracles.query_lse(case, 0.125)
    assert (sums > 17_800).all() and (sums < 18_000).all()
    assert ((sums.half().double() - sums).abs() > 4).any()
    # The newest query alone: its squared probability is at most 1.
    last = [seq_len - 1 for seq_len in case.seq_lens]
    plans = [make_plan(case), make_plan(case, query_start=last)]
    plans[1] = plans[1]._replace(is_first=torch.ones_like(plans[1].is_first))
    lengths = workspace(case, lambda r, lh, rows: values[rows].norm(dim=-1))
    truth = oracles.observe(case, power=2, value_norms=True, scale=0.125)
    how = {"group": 1, "sm_scale": 0.125, "power": 2, "value_norms": True}
    for op in (observe_scores_triton, observe_scores_ref):
        all_of_them, newest = (
            op(case.arena, case.tables, plan, case.query_ring, **how).double()
            for plan in plans
        )
        # Logits have steps of 0.002.
        torch.testing.assert_close(all_of_them, truth, rtol=2e-2, atol=1e-6)
        assert (newest <= 1.02 * lengths).all()
        assert (newest > 0.1 * lengths).any()


@pytest.mark.interpreter
@pytest.mark.parametrize("window", [8, 80])
def test_repeated_queries_do_not_add_up(window: int, device: str) -> None:
    """The larger of the two scores, where earlier passes saw the same queries."""
    lens, folds = [100, 90, 21], [48, 64, 0]
    case = make_case(
        lens, folds, layers=1, group=3, head_dim=64, device=device, window=window
    )
    case.arena.score.uniform_(0, 5e-3 * window / 8)
    plans = [make_plan(case, repeated=flags) for flags in ([True, False, True], None)]
    where, how = (case.arena, case.tables), {**HOW, "group": 3}
    found, added = (
        observe_scores_triton(*where, plan, case.query_ring, **how) for plan in plans
    )
    expected = observe_scores_ref(*where, plans[0], case.query_ring, **how)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    no_past = plans[1]._replace(is_first=torch.ones_like(plans[1].is_first))
    new = observe_scores_triton(*where, no_past, case.query_ring, **how)
    second = int(plans[0].entry_base[1])
    old = (added - new)[:second]
    assert (old > new[:second]).any() and (old < new[:second]).any()
    larger = torch.maximum(old, new[:second])
    torch.testing.assert_close(found[:second], larger, rtol=1e-4, atol=1e-5)
    assert torch.equal(found[second:], added[second:])


@pytest.mark.interpreter
@pytest.mark.parametrize(("group", "window"), [(2, 8), (8, 16), (3, 32), (7, 48)])
def test_all_tile_shapes(
    group: int, window: int, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Fewer, as many and more rows than a program takes; tiles seen by all rows."""
    tiles = ObserveConfig(64, 32, 64, 32, 4, 2)
    monkeypatch.setattr("sglang_kvc.kernels.observe._WIDE_CONFIG", tiles)
    case = make_case(
        [290, 75],
        [128, 0],
        layers=1,
        kv_heads=1,
        group=group,
        head_dim=32,
        device=device,
        window=window,
    )
    check(case, power=2)


@pytest.mark.interpreter
def test_launches_are_chunked(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    case = make_case(
        [50, 33, 80], [32, 0, 32], layers=1, group=2, head_dim=64, device=device
    )
    args = (case.arena, case.tables, make_plan(case), case.query_ring)
    whole = observe_scores_triton(*args, group=2, **HOW)
    monkeypatch.setattr("sglang_kvc.kernels.plan_heads.MAX_PARTIAL", 1)
    assert torch.equal(observe_scores_triton(*args, group=2, **HOW), whole)


def test_reference_against_loops() -> None:
    case = make_case([52, 21], [32, 0], layers=2, group=2, head_dim=16, window=8)
    args = (case.arena, case.tables, make_plan(case), case.query_ring)
    for power in (1, 2):
        out = observe_scores(*args, group=2, sm_scale=0.25, power=power)
        truth = oracles.observe(case, 0.25, power)
        torch.testing.assert_close(out, truth.float())


def test_bad_powers_are_named() -> None:
    case = make_case([20], layers=1, kv_heads=1, group=1, head_dim=16)
    args = (case.arena, case.tables, make_plan(case), case.query_ring)
    with pytest.raises(ValueError, match="power must be 1 or 2, got 3"):
        observe_scores(*args, group=1, sm_scale=0.25, power=3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("seq_lens", "folds", "group", "dim", "window"),
    [
        ([20_000], [0], 4, 128, 32),
        ([3000, 700, 40], [2048, 0, 32], 7, 128, 8),
        ([2500, 5000], [0, 4096], 8, 64, 128),
        ([900], [512], 1, 96, 16),
        # What models have: Qwen2.5 of 0.5B, 1.5B and 3B, Llama 3.1 of 70B.
        ([4079, 900], [0, 512], 7, 64, 32),
        ([4079, 900], [0, 512], 6, 128, 32),
        ([4079, 900], [0, 512], 8, 128, 32),
        ([4079, 900], [0, 512], 16, 128, 32),
    ],
)
def test_gpu_sizes(
    seq_lens: list[int],
    folds: list[int],
    group: int,
    dim: int,
    window: int,
    device: str,
) -> None:
    heads = 64 if len(seq_lens) == 1 else 6
    case = make_case(
        seq_lens,
        folds,
        layers=heads // 2,
        group=group,
        head_dim=dim,
        dtype=torch.bfloat16,
        device=device,
        window=window,
        skew=4.0,
        spare_pages=0,
    )
    check(case, power=2)
    check(case, power=2, value_norms=True)
