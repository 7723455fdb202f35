"""/metrics of a tensor-parallel server: what each rank says of the same requests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_kvc.config import series
from tests.engine.server import MIN_BUDGET, Server, running
from tests.engine.test_server_metrics import RUNNING, Scrape, at_rest
from tests.engine.texts import prompt
from tests.engine.tiny_models import TinyModel

pytestmark = pytest.mark.server

VOCAB = 49_152
"""Of the tokenizer that is put beside a model of two KV heads; SmolLM2 has three."""


@pytest.fixture(scope="module")
def ranks(
    whole_model_path: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server of two ranks, all of which count."""
    folder = tmp_path_factory.mktemp("ranks")
    model = TinyModel("LlamaForCausalLM", (4, 2), 16, {"vocab_size": VOCAB})
    path = model.write(folder / "model")
    for file in Path(whole_model_path).glob("*token*"):
        shutil.copy(file, path)
    flags = ["--tp-size", "2", "--enable-metrics-for-all-schedulers"]
    with pytest.MonkeyPatch.context() as patch:
        cores = os.cpu_count() or 1
        patch.setenv("SGLANG_CPU_OMP_THREADS_BIND", f"0|{1 % cores}")
        launcher = "tests.engine.forking_server"
        with running(path, folder / "log.txt", flags, launcher=launcher) as started:
            yield started


def test_every_rank_counts_the_same_requests(ranks: Server) -> None:
    """So the first rank's figures are the server's, and a sum would be twice them."""
    ids = prompt(ranks.model, 0, 300)
    seen: dict[str, set[float]] = {}
    told = {}
    for chunk in ranks.stream(ids, 40):
        told = chunk["meta_info"]["kv_compress"]
        for sample in Scrape(ranks).of(series.RESIDENT.name):
            seen.setdefault(sample.labels["tp_rank"], set()).add(sample.value)
    assert told["passes"] >= 2
    # Tokens for a KV head on average, whichever heads a rank has.
    assert set(seen) == {"0", "1"}
    for values in seen.values():
        assert any(MIN_BUDGET <= value < 300 for value in values), seen
    after = at_rest(ranks)
    for one in (series.PASSES, series.MOVED, series.DEFERRED):
        first, second = (after.value(one, tp_rank=rank) for rank in "01")
        assert first == second
    assert after.value(series.PASSES, tp_rank="0") == told["passes"]
    assert after.value(series.SECONDS, tp_rank="1") > 0
    assert {it.labels["tp_rank"] for it in after.of(RUNNING)} == {"0", "1"}
