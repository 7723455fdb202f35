"""`observe_scores`: arithmetic."""

import pytest
import torch

from sglang_kvc.kernels.observe import (
    ObserveConfig,
    observe_scores,
    observe_scores_ref,
    observe_scores_triton,
)
from sglang_kvc.kernels.testing import Case, make_case, make_plan
from tests.kernels import oracles

HOW = {"sm_scale": 0.125, "power": 2}


def check(
    case: Case,
    power: int,
    query_start: int = 0,
    recorded: list[bool] | None = None,
    value_norms: bool = False,
) -> None:
    """Compare the kernel with float64 and with torch at the model's dtype.

    Requests whose log-sum-exps were recorded must not need to work them out.
    """
    arena = case.arena
    starts = [query_start] * len(case.slots)
    plan = make_plan(case, query_start=starts, recorded=recorded)
    scale = arena.head_dim**-0.5
    args = (arena, case.tables, plan, case.query_ring, case.query_lse)
    how = {"sm_scale": scale, "power": power, "value_norms": value_norms}
    found = oracles.query_lse(case, scale, query_start).float()
    for slot, known in zip(case.slots, recorded or [], strict=False):
        if known:
            case.query_lse[slot] = found[slot]
    out = observe_scores_triton(*args, **how)
    seen = ~found.isnan()
    torch.testing.assert_close(case.query_lse[seen], found[seen], atol=1e-3, rtol=0)
    truth = oracles.observe(case, scale, power, query_start, value_norms=value_norms)
    if arena.k.dtype == torch.float32:
        working = observe_scores_ref(*args, **how)
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
@pytest.mark.parametrize("recorded", [[True, False, True], [True, True, True]])
def test_recorded_log_sum_exps_are_taken(recorded: list[bool], device: str) -> None:
    case = make_case(
        [84, 37, 200], [64, 16, 96], layers=2, group=3, head_dim=64, device=device
    )
    check(case, power=2, recorded=recorded)


@pytest.mark.interpreter
def test_a_recorded_log_sum_exp_is_believed(device: str) -> None:
    case = make_case(
        [100], [48], layers=1, kv_heads=1, group=2, head_dim=64, device=device
    )
    plan = make_plan(case, recorded=[True])._replace(
        is_first=torch.ones(1, device=device).long()
    )
    scores = []
    for lse in (3.0, 4.0):
        case.query_lse.fill_(lse)
        args = (case.arena, case.tables, plan, case.query_ring, case.query_lse)
        for op in (observe_scores_triton, observe_scores_ref):
            scores.append(op(*args, **HOW))
    # A GPU's exp2 is an approximation, of a logit that was summed in another order.
    close = {"rtol": 1e-4, "atol": 1e-12}
    torch.testing.assert_close(scores[0], scores[1], **close)
    torch.testing.assert_close(scores[0], 4 * scores[2], **close)


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
    where, rings = (case.arena, case.tables), (case.query_ring, case.query_lse)
    found, added = (
        observe_scores_triton(*where, plan, *rings, **HOW) for plan in plans
    )
    expected = observe_scores_ref(*where, plans[0], *rings, **HOW)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    no_past = plans[1]._replace(is_first=torch.ones_like(plans[1].is_first))
    new = observe_scores_triton(*where, no_past, *rings, **HOW)
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
    args = (case.arena, case.tables, make_plan(case), case.query_ring, case.query_lse)
    whole = observe_scores_triton(*args, **HOW)
    monkeypatch.setattr("sglang_kvc.kernels.plan_heads.MAX_PARTIAL", 1)
    assert torch.equal(observe_scores_triton(*args, **HOW), whole)


def test_reference_against_loops() -> None:
    case = make_case([52, 21], [32, 0], layers=2, group=2, head_dim=16, window=8)
    args = (case.arena, case.tables, make_plan(case), case.query_ring, case.query_lse)
    for power in (1, 2):
        out = observe_scores(*args, sm_scale=0.25, power=power)
        truth = oracles.observe(case, 0.25, power)
        torch.testing.assert_close(out, truth.float())


def test_bad_powers_are_named() -> None:
    case = make_case([20], layers=1, kv_heads=1, group=1, head_dim=16)
    args = (case.arena, case.tables, make_plan(case), case.query_ring, case.query_lse)
    with pytest.raises(ValueError, match="power must be 1 or 2, got 3"):
        observe_scores(*args, sm_scale=0.25, power=3)


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
