"""One real scheduler and one server per pytest session, on SmolLM2 and the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.engine.inprocess import InProcessScheduler, make_server_args
from tests.engine.server import Server, running
from tests.engine.shallow import shallow, wants_whole

# Small numbers so that short prompts are compressed and pass twice in few tokens.
OPTIONS = {
    "kv_compress_rate": 4,
    "kv_compress_min_budget": 64,
    "kv_compress_interval": 16,
}


@pytest.fixture(scope="session")
def whole_model_path() -> str:
    """SmolLM2-135M-Instruct; fetched if missing, a failure to fetch fails the test."""
    from sglang_kvc.tools.fetch_model import fetch

    return str(fetch("smollm2-135m-instruct"))


@pytest.fixture(scope="session")
def model_path(whole_model_path: str) -> str:
    """Its first layers, unless all tests are to use the whole model."""
    return whole_model_path if wants_whole() else str(shallow(Path(whole_model_path)))


@pytest.fixture(scope="session")
def scheduler(model_path: str) -> InProcessScheduler:
    """The scheduler with --kv-compress; chunk 256, overlap and radix cache on."""
    return InProcessScheduler(make_server_args(model_path, compress=True, **OPTIONS))


@pytest.fixture
def fresh(scheduler: InProcessScheduler) -> Iterator[InProcessScheduler]:
    """The scheduler with an empty cache and its default switches."""
    scheduler.set_overlap(True)
    scheduler.set_radix(True)
    yield scheduler
    scheduler.on_poll = None
    scheduler.flush()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the server go last: an idle one keeps a core busy."""
    items.sort(key=lambda item: item.get_closest_marker("server") is not None)


@pytest.fixture(scope="session")
def server(
    model_path: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A running server, shared: a start takes a minute. It is asked for JSON, too."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with running(model_path, log) as started:
        yield started


@pytest.fixture(scope="session")
def client(server: Server) -> openai.OpenAI:
    """OpenAI's client, as its documentation sets it up."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
