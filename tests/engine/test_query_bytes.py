"""What it changes that queries are remembered in 8 bits: hardly anything is kept less.

The oracle chooses from the same scores twice, of exact queries and of remembered ones.
``KVC_PROMPTS`` asks more prompts, ``KVC_TEST_WHOLE_MODEL=1`` all layers; ``-rP`` prints
the shares::

    KVC_TEST_WHOLE_MODEL=1 KVC_PROMPTS=20 python -m pytest -rP \
        tests/engine/test_query_bytes.py
"""

from __future__ import annotations

import os

import pytest
import torch

from sglang_kvc.config.options import KVCompressOptions
from tests.engine.oracle import Oracle, Policy, Step
from tests.engine.oracle.choice import choose
from tests.engine.oracle.model import in_bytes
from tests.engine.oracle.replay import OracleRequest
from tests.engine.texts import prompt

PROMPTS = int(os.environ.get("KVC_PROMPTS", "2"))
LENGTH = 1024
STRIDE = 1500


@pytest.fixture(scope="module")
def oracle(model_path: str) -> Oracle:
    return Oracle(model_path, KVCompressOptions())


def kept_of(request: OracleRequest, budget: int) -> list[set[int]]:
    """What each head keeps of a prompt."""
    request.tokens.extend(request.prompt)
    scores = request.scores.update(prompt=True, repeated=False)
    rule = request._rule(Step(LENGTH), budget, prompt=True)
    everything = [list(range(LENGTH))] * len(scores)
    return [set(own) for own in choose(scores, everything, rule).kept]


@pytest.mark.parametrize("rate", [2, 8])
def test_the_same_is_kept_as_with_exact_queries(
    oracle: Oracle, model_path: str, rate: int
) -> None:
    same = total = 0
    for number in range(PROMPTS):
        ids = prompt(model_path, STRIDE * number, LENGTH)
        kept = []
        for rounds in (True, False):
            request = oracle.request(ids, Policy())
            request.tokens.rounds = rounds
            kept.append(kept_of(request, LENGTH // rate))
        same += sum(len(a & b) for a, b in zip(*kept, strict=True))
        total += sum(map(len, kept[1]))
    print(f"rate {rate}: {same} of {total} kept KVs are the same, {same / total:.4f}")
    assert total == PROMPTS * oracle.layers * oracle.heads * LENGTH // rate
    assert 0.97 * total < same < total


def test_bytes_of_the_oracle_err_by_a_step() -> None:
    """It rounds by itself; the first 8 elements have steps twice as wide."""
    torch.manual_seed(0)
    q = torch.randn(500, 64) * 10
    error, step = (in_bytes(q) - q).abs(), q.abs().amax(1, keepdim=True) / 61.5
    assert (error[:, :8] <= step).all() and (error[:, 8:] <= step / 2).all()
    assert error[:, :8].mean() > 1.5 * error[:, 8:].mean()
