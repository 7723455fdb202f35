"""Every scorer keeps what the interface promises, with kernels and with references."""

from collections.abc import Iterator

import pytest
import torch

from sglang_kvc.config.metrics import ATTENTION_METRICS, METRICS
from sglang_kvc.eviction.scorers import SCORERS, ScoreContext, Scorer
from sglang_kvc.kernels.layout import PassPlan
from sglang_kvc.kernels.ops import OPS
from sglang_kvc.kernels.testing import Case, make_case, make_plan
from tests.kernels import oracles
from tests.kernels.test_scorers import padding, workspace

WINDOW = 8
FOLDS = [0, 32, 48]


@pytest.fixture(
    params=["reference", pytest.param("triton", marks=pytest.mark.interpreter)],
    autouse=True,
)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test with either form of the ops."""
    for module in {op.module for op in OPS}:
        monkeypatch.setattr(
            module, "use_triton", lambda tensor: request.param == "triton"
        )


@pytest.fixture(params=SCORERS.values(), ids=SCORERS.keys())
def scorer(request: pytest.FixtureRequest) -> Scorer:
    return request.param


def batch(device: str) -> Case:
    """A new request, a packed one without a tail, one with both; head_dim 80."""
    case = make_case(
        [19, 33, 67],
        FOLDS,
        layers=1,
        kv_heads=3,
        group=2,
        head_dim=80,
        skew=4.0,
        device=device,
        window=WINDOW,
    )
    return case._replace(seq_lens=[19, 32, 67])


def context(case: Case, plan: PassPlan | None = None) -> ScoreContext:
    return ScoreContext(
        query_ring=case.query_ring,
        arena=case.arena,
        tables=case.tables,
        plan=plan or make_plan(case),
        group=case.group,
        sm_scale=80**-0.5,
    )


def with_stored(case: Case, stored: torch.Tensor) -> Case:
    return case._replace(arena=case.arena._replace(score=stored))


def tensors(case: Case, plan: PassPlan) -> Iterator[torch.Tensor]:
    """Everything that a scorer must not write."""
    yield from (*case.arena.cells, *case.tables, *case.query_ring[:3])
    yield from (field for field in plan if isinstance(field, torch.Tensor))


def from_arena(case: Case, cells: torch.Tensor) -> torch.Tensor:
    """Workspace of what `cells` [pages, L, H, S] hold, float64."""
    return workspace(case, lambda r, lh, rows: cells.view(-1)[rows])


def test_scores_are_finite_and_padding_is_zero(scorer: Scorer, device: str) -> None:
    case = batch(device)
    scores = scorer.score(context(case))
    empty = padding(case)
    assert scores.dtype == torch.float32
    assert scores.shape == empty.shape
    assert scores.isfinite().all()
    assert (scores >= 0).all()
    assert (scores[empty] == 0).all()
    assert (scores[~empty] > 0).any()
    assert empty.any()


def test_scores_are_new_and_deterministic(scorer: Scorer, device: str) -> None:
    case = batch(device)
    plan = make_plan(case)
    before = [tensor.clone() for tensor in tensors(case, plan)]
    first = scorer.score(context(case, plan))
    second = scorer.score(context(case, plan))
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, second)
    for old, new in zip(before, tensors(case, plan), strict=True):
        assert torch.equal(old.view(torch.uint8), new.view(torch.uint8))


def test_stored_scores_count_as_declared(scorer: Scorer, device: str) -> None:
    case = batch(device)
    stored = case.arena.score
    fresh = scorer.score(context(with_stored(case, torch.zeros_like(stored))))
    scores = scorer.score(context(case))
    known = from_arena(case, stored)
    later = workspace(case, lambda r, lh, rows: stored.view(-1)[rows] * 0 + r) > 0
    assert torch.equal(scores[~later], fresh[~later]), "a first pass has none"
    if not scorer.accumulates:
        assert torch.equal(scores, fresh)
    elif scorer.name == "random":
        assert torch.equal(scores[later], known[later].float())
        assert not torch.equal(scores[later], fresh[later])
    else:
        expected = fresh.double() + known
        torch.testing.assert_close(scores[later].double(), expected[later])
        repeated = make_plan(case, repeated=[True] * len(case.slots))
        expected = torch.maximum(fresh.double(), known)
        scores = scorer.score(context(case, repeated))
        torch.testing.assert_close(scores[later].double(), expected[later])


@pytest.mark.parametrize("name", ATTENTION_METRICS)
def test_attention_is_that_of_the_window(name: str, device: str) -> None:
    case, metric = batch(device), METRICS[name]
    assert metric.power is not None
    scores = SCORERS[name].score(context(case))
    truth = oracles.observe(
        case, 80**-0.5, metric.power, value_norms=metric.value_norms
    )
    torch.testing.assert_close(scores.double(), truth, rtol=1e-5, atol=1e-6)


def test_bad_powers_are_named(device: str) -> None:
    with pytest.raises(ValueError, match="power must be 1 or 2, got 3"):
        context(batch(device)).attention(3)
