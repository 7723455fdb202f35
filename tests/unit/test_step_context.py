"""The folds of a step are seen by the forwards of that step alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sglang.srt.model_executor.forward_context import (
    ForwardContext,
    forward_context,
    get_attn_backend,
    has_forward_context,
)

from sglang_kvc.attention.step_context import folds_of_forward, forwards_with
from sglang_kvc.scheduling.step_plan import Fold

RUNNER = SimpleNamespace(attn_backend=object())
FOLDS = [Fold(320, 64), Fold(0, 0)]


def test_inside_the_backend_is_found_as_ever() -> None:
    assert not folds_of_forward()
    with forwards_with(RUNNER, FOLDS):
        assert folds_of_forward() == FOLDS
        assert get_attn_backend() is RUNNER.attn_backend
    assert not folds_of_forward()


def test_nothing_is_left_behind_by_a_forward_that_fails() -> None:
    with pytest.raises(RuntimeError), forwards_with(RUNNER, FOLDS):
        raise RuntimeError
    assert not has_forward_context()


def test_without_folds_the_context_is_sglangs_own() -> None:
    with forwards_with(RUNNER, []):
        assert not has_forward_context()
    with forward_context(ForwardContext(RUNNER.attn_backend)):
        assert not folds_of_forward()
