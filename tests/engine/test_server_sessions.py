"""A server that keeps sessions, as its clients see it."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from bench.common import server as driven
from bench.serving.conversations.drive import Drive
from bench.serving.conversations.figures import (
    counters,
    host_cache_gb,
    summarize,
    wrong_side,
)
from bench.serving.conversations.load import Load, Shape
from bench.serving.conversations.vocabulary import vocabulary_size
from sglang_kvc.config import series
from tests.engine.server import ANSWER_S, Server, running
from tests.engine.texts import corpus, prompt

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "session_agent.py"
TURNS = 20

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def keeper(
    whole_model_path: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server of its own: on the shared one every hit is exact."""
    log = tmp_path_factory.mktemp("keeper") / "log.txt"
    flags = ["--kv-compress-sessions", "--kv-compress-sessions-host", "0.5"]
    with running(whole_model_path, log, flags) as started:
        yield started


def value_of(server: Server, one: series.Series) -> float:
    """A series at /metrics."""
    text = requests.get(f"{server.url}/metrics", timeout=ANSWER_S).text
    (line,) = [it for it in text.splitlines() if it.startswith(one.name + "{")]
    return float(line.split()[-1])


def agent() -> Any:
    """The program of the guide."""
    spec = importlib.util.spec_from_file_location("session_agent", EXAMPLE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["session_agent"] = module
    spec.loader.exec_module(module)
    return module


def test_an_agent_computes_its_document_once(keeper: Server) -> None:
    """20 turns; what each computes is what is new to it."""
    client = openai.OpenAI(base_url=f"{keeper.url}/v1", api_key="none", max_retries=0)
    _, reports = agent().run(
        client, corpus()[:2400], "What is an argument?", TURNS, max_tokens=12
    )
    assert len(reports) > 5
    held = [report["resumed_tokens"] for report in reports]
    assert held[0] == 0
    # Where a client's text is tokenized otherwise than it was generated, nothing fits.
    resumed = [at for at, tokens in enumerate(held) if tokens]
    assert len(resumed) >= 0.8 * (len(reports) - 1)
    for at in resumed:
        before, now = reports[at - 1], reports[at]
        assert now["prompt_tokens"] - held[at] < 200
        assert now["generations"] >= before["generations"]
        assert now["resident_tokens"] < now["logical_tokens"] / 2
    computed = sum(it["prompt_tokens"] - it["resumed_tokens"] for it in reports)
    assert computed < sum(it["prompt_tokens"] for it in reports) / 3


def test_metrics_count_them(keeper: Server) -> None:
    """Behind the agent's turns: the last of them has replaced all others."""
    assert value_of(keeper, series.HITS) > 0
    assert value_of(keeper, series.SNAPSHOTS) >= 1
    held = value_of(keeper, series.SNAPSHOTS) * 64
    assert value_of(keeper, series.SNAPSHOT_TOKENS) >= held
    assert keeper.post("/flush_cache", {}).status_code == 200
    keeper.generate(prompt(keeper.model, 0, 20), 1)
    requests.get(f"{keeper.url}/metrics", timeout=ANSWER_S)
    assert value_of(keeper, series.EVICTIONS) == 0
    # There is room for all in the pool.
    assert value_of(keeper, series.IN_HOST) == 0
    assert value_of(keeper, series.BROUGHT_BACK) == 0
    assert host_cache_gb(keeper.log.read_text()) > 0


def test_a_request_says_what_it_leaves_and_starts_from(keeper: Server) -> None:
    ids = prompt(keeper.model, 3000, 300)
    first = keeper.post(
        "/generate",
        {
            "input_ids": ids,
            "sampling_params": {"temperature": 0, "max_new_tokens": 40},
        },
    ).json()
    more = ids + first["output_ids"] + prompt(keeper.model, 9000, 60)
    resumed = keeper.generate(more, 4, {"keep": "none"})
    tokens = resumed["kv_compress"]["resumed_tokens"]
    assert tokens == resumed["cached_tokens"] > 300
    assert resumed["kv_compress"]["generations"] > 0
    exact = keeper.generate(more, 4, {"enabled": False})
    assert exact["kv_compress"]["resumed_tokens"] == 0
    other = more[:-20] + prompt(keeper.model, 9500, 30)
    computed = keeper.generate(other, 4, {"resume": False, "keep": "whole"})
    assert computed["kv_compress"]["resumed_tokens"] == 0


def test_a_fork_of_several_answers_starts_from_one_snapshot(keeper: Server) -> None:
    ids = prompt(keeper.model, 5000, 300)
    params = {"temperature": 0, "max_new_tokens": 40}
    first = keeper.post("/generate", {"input_ids": ids, "sampling_params": params})
    more = ids + first.json()["output_ids"] + prompt(keeper.model, 12_000, 60)
    params = {"temperature": 1.0, "max_new_tokens": 24, "n": 4}
    answers = keeper.post("/generate", {"input_ids": more, "sampling_params": params})
    told = [it["meta_info"]["kv_compress"] for it in answers.json()]
    assert len(told) == 4
    assert all(it["resumed_tokens"] > 300 for it in told)


def test_a_load_of_conversations_is_served(keeper: Server) -> None:
    """What `bench.serving.conversations` drives and counts, also of a fork."""
    # Answers of more than a page: what a turn leaves reaches further than its prompt.
    shape = Shape(
        sessions=2, turns=2, first=200, user=40, answer=24, think=0.1, forks=0.5
    )
    load = Load(shape, vocabulary_size(Path(keeper.model)))
    drive = Drive(driven.Server(keeper.url), load, seconds=ANSWER_S, stall=ANSWER_S)
    assert asyncio.run(drive.run()), drive.turns
    values = summarize(drive.turns, shape.all_turns, drive.begin)
    assert wrong_side(values, stock=False) == ""
    assert values["turn_1"]["cached_tokens"] == 0
    # Both ways of the fork start from what their common turn has left.
    assert values["resumed_turns"] == values["later"]["turns"] == 3
    assert values["later"]["cached_tokens"] == values["resumed_tokens"]
    # All but what is new and less than a page each.
    assert values["later"]["computed_tokens"] <= 3 * (40 + 16)
    assert values["last_turn_hits"] == 1
    found = counters(requests.get(f"{keeper.url}/metrics", timeout=ANSWER_S).text)
    assert found["snapshots"] >= 3
