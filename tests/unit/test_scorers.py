"""The scorers by name, and what a new one must bring."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import ClassVar

import pytest
import torch

from sglang_kvc.config.metrics import ATTENTION_METRICS, METRICS
from sglang_kvc.errors import ConfigError
from sglang_kvc.eviction.scorers import SCORERS, ScoreContext, Scorer, get_scorer


@pytest.mark.parametrize("name", list(SCORERS))
def test_scorers_are_found_by_name(name: str) -> None:
    scorer = get_scorer(name)
    assert scorer.name == name
    assert isinstance(scorer.accumulates, bool)
    assert isinstance(scorer.pooled, bool)
    with pytest.raises(dataclasses.FrozenInstanceError):
        scorer.name = "other"  # type: ignore[misc]


def test_unknown_names_list_the_known() -> None:
    message = f"metric must be one of {', '.join(SCORERS)}, got 'l3'."
    with pytest.raises(ConfigError) as raised:
        get_scorer("l3")
    assert str(raised.value) == message


def test_every_metric_of_the_options_has_a_scorer() -> None:
    assert set(METRICS) == set(SCORERS)


@pytest.mark.parametrize("name", METRICS)
def test_a_scorer_is_what_the_options_say(name: str) -> None:
    class Asked(ScoreContext):
        """Notes what a scorer asks of the attention."""

        def attention(self, power: int, *, value_norms: bool = False) -> torch.Tensor:
            asked.append((power, value_norms))
            return torch.zeros(0)

    metric, scorer = METRICS[name], SCORERS[name]
    assert scorer.observes == metric.observes
    asked: list[tuple[int, bool]] = []
    if metric.observes:
        scorer.score(object.__new__(Asked))
        assert asked == [(metric.power, metric.value_norms)]
    else:
        assert (metric.power, metric.value_norms) == (None, False)


def test_what_accumulates_and_what_is_pooled() -> None:
    attention = set(ATTENTION_METRICS)
    accumulating = {name for name, s in SCORERS.items() if s.accumulates}
    assert accumulating == attention | {"random"}
    pooled = {name for name, s in SCORERS.items() if s.pooled}
    assert pooled == attention


def test_a_scorer_is_a_class_with_one_method() -> None:
    @dataclasses.dataclass(frozen=True)
    class Flat(Scorer):
        observes: ClassVar[bool] = False
        accumulates: ClassVar[bool] = False
        pooled: ClassVar[bool] = False

        def score(self, ctx: ScoreContext) -> torch.Tensor:
            return torch.ones(ctx.plan.num_entries)

    assert Flat("flat") == Flat("flat")
    with pytest.raises(TypeError, match="abstract"):
        Scorer("none")  # type: ignore[abstract]


def test_scorers_import_no_sglang() -> None:
    code = (
        "import sys, sglang_kvc.eviction.scorers\n"
        "sys.exit(any(name.split('.')[0] == 'sglang' for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
