"""An e4m3 KV cache: what is stored, answered and kept, and that no page is lost.

Stock SGLang has no e4m3 cache on a CPU without AMX, so there is no server to compare
with: the oracle attends to the KVs that the server has stored.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_kvc.config.options import KVCompressOptions
from sglang_kvc.kernels.kv_dtype import E4M3, narrow_ref
from tests.engine import warm
from tests.engine.e4m3 import BUDGET, LENGTH, MIXED, NEW, SCALES
from tests.engine.kept import OPTIONS
from tests.engine.oracle import TIE, Oracle, Step, check_few_differ
from tests.engine.stress import PAGE, POOL
from tests.engine.tiny_model import HEADS, LAYERS, write_tiny_model

HEAD_DIM = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def report(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Report of `tests.engine.e4m3`, run in a process of its own."""
    target = tmp_path_factory.mktemp("e4m3") / "report.pt"
    log = warm.run("tests.engine.e4m3", model, target, log=target.with_suffix(".log"))
    assert target.exists(), log
    result: dict[str, Any] = torch.load(target, weights_only=False)
    assert "traceback" not in result, result["traceback"]
    return result


@pytest.fixture(scope="module")
def oracle(model: str) -> Oracle:
    return Oracle(model, KVCompressOptions(**OPTIONS))


def test_the_pool_has_a_byte_an_element(report: dict[str, Any]) -> None:
    """And scales of 1, since the checkpoint has none."""
    assert report["dtype"] == str(E4M3)
    assert report["bytes"] == 2 * (POOL + PAGE) * LAYERS * HEADS * HEAD_DIM
    assert report["scales"] == [(1.0, 1.0)] * LAYERS


def test_what_is_stored_is_the_rounded_kv(
    report: dict[str, Any], oracle: Oracle
) -> None:
    """All but roundings that fp32 sums in another order have tipped."""
    served = report["whole"]
    own = oracle.request(served["prompt"])
    own.tokens.stored = served["kvs"]
    own.tokens.extend(served["prompt"])
    for layer, scales in SCALES.items():
        kvs = zip(own.tokens.made[layer], served["kvs"][layer], scales, strict=True)
        for made, stored, scale in kvs:
            factor, found = torch.tensor(scale), stored[:, :LENGTH]
            rounded = narrow_ref(made, factor, E4M3).float() * factor
            assert (rounded != found).float().mean() < 1e-3
            # It is not the KV itself: something is rounded.
            assert (made != found).float().mean() > 0.9


def test_rate_one_decodes_what_the_oracle_does(
    report: dict[str, Any], oracle: Oracle
) -> None:
    """Greedy tokens, over the same KVs; a near-tie may go either way."""
    served = report["whole"]
    assert len(served["output"]) == NEW
    assert not served["kept"]
    request = oracle.request(served["prompt"])
    request.tokens.stored = served["kvs"]
    ids = served["prompt"] + served["output"][:-1]
    logits = request.tokens.extend(ids)[LENGTH - 1 :]
    best = logits.max(-1).values
    chosen = logits.gather(1, torch.tensor(served["output"])[:, None])[:, 0]
    assert (best - chosen).max() < 1e-3
    assert (logits.argmax(-1) == torch.tensor(served["output"])).sum() >= NEW - 1


def test_kept_positions_equal_the_oracle(
    report: dict[str, Any], oracle: Oracle
) -> None:
    """After prefill and after two periodic passes, in every layer and head."""
    served = report["packed"]
    passes, lengths = served["kept"], served["lengths"]
    assert len(passes) == 3
    request = oracle.request(served["prompt"])
    request.tokens.stored = served["kvs"]
    steps = [Step(length) for length in lengths]
    differing = request.replay(served["output"], steps, passes, BUDGET, TIE)
    check_few_differ(differing, len(passes) * BUDGET * oracle.layers * oracle.heads)
    assert len({len(positions) for positions in passes[0]}) > 2


def test_no_page_is_lost(report: dict[str, Any]) -> None:
    """With aborts and retractions; SGLang's strict checks were on."""
    stress = report["stress"]
    assert stress["free"] == POOL
    assert stress["aborted"] > 3
    assert stress["passes"] > MIXED // 2
    assert stress["retractions"] > 0
    assert stress["audits"] > 50
