"""/metrics of a real server, read by Prometheus' own parser and by Prometheus."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from sglang_kvc.config import series
from tests.engine.server import MIN_BUDGET, Server, body_of, free_port
from tests.engine.texts import prompt
from tests.unit.test_grafana import either, expressions, names_in

pytestmark = pytest.mark.server

RUNNING = "sglang:num_running_reqs"
REGION = 30_000
"""Of the corpus: no other test shares its prefixes."""


class Scrape:
    """Samples of one look at /metrics."""

    def __init__(self, server: Server) -> None:
        response = requests.get(f"{server.url}/metrics", timeout=60)
        assert response.status_code == 200
        self.samples = [
            sample
            for family in text_string_to_metric_families(response.text)
            for sample in family.samples
        ]
        self.names = {sample.name for sample in self.samples}

    def of(self, name: str) -> list[Any]:
        """Samples of a series."""
        return [sample for sample in self.samples if sample.name == name]

    def value(self, one: series.Series, **labels: str) -> float:
        """Sum over all processes and, without `labels`, over all values of a label."""
        return sum(
            sample.value
            for sample in self.of(one.name)
            if labels.items() <= sample.labels.items()
        )


def wait_until(true: Callable[[], Any], otherwise: str) -> None:
    """Wait for something that takes a second or two."""
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end, otherwise
        time.sleep(0.2)


def at_rest(server: Server) -> Scrape:
    """Look until nothing runs and all passes are measured."""

    def rests() -> bool:
        return not Scrape(server).value(series.LOGICAL)

    wait_until(rests, "the gauges of an idle server do not fall")
    return Scrape(server)


def test_counters_add_up_to_what_requests_report(server: Server) -> None:
    server.generate(prompt(server.model, REGION, 20), 1)
    before = at_rest(server)
    running: list[Scrape] = []
    told = []
    for chunk in server.stream(prompt(server.model, REGION, 300), 40):
        told = [chunk["meta_info"]["kv_compress"]]
        if len(running) < 3:
            running.append(Scrape(server))
    told += [
        server.generate(prompt(server.model, REGION + 5000, 150), 20, kv)["kv_compress"]
        for kv in ({"budget": MIN_BUDGET}, {"enabled": False})
    ]
    after = at_rest(server)

    def grown(one: series.Series, **labels: str) -> float:
        return after.value(one, **labels) - before.value(one, **labels)

    assert grown(series.PASSES) == sum(kv["passes"] for kv in told) >= 4
    assert grown(series.PASSES, kind="prompt") == 2
    assert grown(series.PASSES, kind="chunk") == 0
    assert grown(series.DEFERRED) == sum(kv["deferred_passes"] for kv in told)
    assert grown(series.MOVED) >= MIN_BUDGET // 16 * grown(series.PASSES)
    assert grown(series.SECONDS) > 0
    assert any(0 < one.value(series.RESIDENT) < 340 for one in running)
    assert math.isnan(after.value(series.RATIO))


def test_refused_requests_are_counted_by_reason(server: Server) -> None:
    """None of the reasons, and no other label, is anything that a client has sent."""
    before = Scrape(server)
    long = prompt(server.model, REGION, 8185)
    for ids, kv, reason in (
        ([1, 2], {"rate": 0.5}, "options"),
        ([10**7], None, "field"),
        (long, {"enabled": False}, "too_long"),
    ):
        response = server.post("/generate", body_of(ids, 2, kv))
        assert response.status_code == 400, (reason, response.text)
        after = Scrape(server)
        for each in series.REFUSED.values:
            change = [it.value(series.REFUSED, reason=each) for it in (before, after)]
            assert change[1] - change[0] == (each == reason), each
        before = after


def test_every_series_is_there_with_sglangs_labels(server: Server) -> None:
    found = Scrape(server)
    own = {name for name in found.names if name.startswith(series.PREFIX)}
    # Clients of Python also tell when a counter was made.
    own = {name for name in own if not name.endswith("_created")}
    assert own == {one.name for one in series.SERIES}
    (stock,) = found.of(RUNNING)
    for one in series.SERIES:
        for sample in found.of(one.name):
            label = sample.labels.pop(one.label, "")
            assert label in (one.values or ("",))
            if "tp_rank" in sample.labels:
                assert sample.labels == stock.labels
            else:
                # Of the tokenizer process, which has no rank.
                assert one is series.REFUSED
                assert sample.labels.items() <= stock.labels.items()


def test_the_dashboard_asks_for_what_there_is(server: Server) -> None:
    assert {name for text in expressions() for name in names_in(text)} <= Scrape(
        server
    ).names


def test_options_in_force_can_be_asked_for(server: Server) -> None:
    for path in ("/server_info", "/get_server_info"):
        info = requests.get(f"{server.url}{path}", timeout=60).json()
        assert info["kv_compress"]["rate"] == 4.0
        assert info["kv_compress"]["min_budget"] == MIN_BUDGET
        assert info["kv_compress"]["layer_share"] == 0.5


def test_the_log_says_what_memory_went_where(server: Server) -> None:
    text = server.log.read_text(errors="replace")
    _, _, table = text.partition("Memory of this rank with KV-Compress:\n")
    head = table.split("KV-Compress metadata: ")[0]
    names = [line.split("  ")[1] for line in head.splitlines()]
    assert names[:4] == ["weights", "keys and values", "scores", "block tables"]
    assert [name.strip() for name in names[-3:]] == ["other", "free", "total"]


# Prometheus ---------------------------------------------------------------------------


@pytest.fixture
def prometheus(server: Server, tmp_path: Path) -> Iterator[str]:
    """A Prometheus server that scrapes the server; its URL."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed (Debian: apt install prometheus)")
    target = server.url.removeprefix("http://")
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [
            {"job_name": "sglang", "static_configs": [{"targets": [target]}]}
        ],
    }
    # JSON is YAML.
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))
    address = f"127.0.0.1:{free_port()}"
    with (tmp_path / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={tmp_path / 'prometheus.yml'}",
                f"--storage.tsdb.path={tmp_path / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        wait_until(
            lambda: ready(f"http://{address}/-/ready"), "Prometheus is not ready"
        )
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)


def ready(url: str) -> bool:
    """Whether a page answers."""
    try:
        return requests.get(url, timeout=30).status_code == 200
    except requests.ConnectionError:
        return False


def ask(url: str, expression: str) -> list[Any]:
    """Series that a query of Prometheus gives now."""
    answer = requests.get(
        f"{url}/api/v1/query", params={"query": expression}, timeout=30
    ).json()
    assert answer["status"] == "success", (expression, answer)
    result: list[Any] = answer["data"]["result"]
    return result


def test_prometheus_scrapes_it_and_runs_the_dashboards_queries(
    server: Server, prometheus: str
) -> None:
    name = f'__name__=~"{either(series.PASSES.name)}"'
    # Two scrapes, so that there are rates.
    twice = f'count_over_time({{{name},kind="prompt"}}[1m]) >= 2'
    wait_until(
        lambda: ask(prometheus, twice), "Prometheus has no samples of the server"
    )
    (up,) = ask(prometheus, 'up{job="sglang"}')
    assert up["value"][1] == "1"
    for text in expressions():
        # Grafana puts in the range between two points of a panel.
        assert ask(prometheus, text.replace("$__rate_interval", "1m")), text
    shown = Scrape(server).value(series.PASSES)
    (total,) = ask(prometheus, f"sum({{{name}}})")
    assert float(total["value"][1]) == shown
