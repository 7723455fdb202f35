"""One HTTP server on the CPU for the tests that use it, and what they send."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from bench.common.ports import free_ports
from sglang_kvc.tools import serve
from tests.engine.texts import prompt

MIN_BUDGET = 64
INTERVAL = 16
FLAGS = (
    f"--kv-compress-min-budget {MIN_BUDGET} --kv-compress-interval {INTERVAL} "
    "--chunked-prefill-size 256 --max-total-tokens 8192 --max-running-requests 8 "
    "--enable-cache-report --enable-metrics --sleep-on-idle"
).split()
LAUNCHER = "sglang.launch_server"
START_S = 900
"""Only what hangs takes so long: on a busy machine two ranks needed more than 300."""
ANSWER_S = 600


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    model: str
    process: subprocess.Popen[bytes]
    log: Path

    def post(self, path: str, body: dict[str, Any], **kwargs: Any) -> Any:
        """Send a JSON body; return the response."""
        return requests.post(f"{self.url}{path}", json=body, timeout=ANSWER_S, **kwargs)

    def generate(
        self, ids: list[int], max_new: int = 8, kv: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Answer a request through /generate and return its meta_info."""
        response = self.post("/generate", body_of(ids, max_new, kv))
        assert response.status_code == 200, response.text
        info: dict[str, Any] = response.json()["meta_info"]
        assert info["completion_tokens"] == max_new
        return info

    def stream(
        self, ids: list[int], max_new: int, answers: int = 1
    ) -> Iterator[dict[str, Any]]:
        """Chunks of a streamed /generate as they arrive."""
        body = {**body_of(ids, max_new, None), "stream": True}
        body["sampling_params"]["n"] = answers
        with self.post("/generate", body, stream=True) as response:
            assert response.status_code == 200, response.text
            for line in response.iter_lines():
                if line and line != b"data: [DONE]":
                    yield json.loads(line.removeprefix(b"data: "))


def body_of(ids: list[int], max_new: int, kv: dict[str, Any] | None) -> dict[str, Any]:
    """Body of a /generate request that decodes exactly `max_new` tokens."""
    params = {"temperature": 0, "max_new_tokens": max_new, "ignore_eos": True}
    custom = {"custom_params": {"kv_compress": kv}} if kv is not None else {}
    return {"input_ids": ids, "sampling_params": {**params, **custom}}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    return free_ports(1)[0]


@contextlib.contextmanager
def running(
    model_path: str,
    log: Path,
    extra: Sequence[str] = (),
    may_end: bool = False,
    launcher: str = LAUNCHER,
) -> Iterator[Server]:
    """``python -m sglang.launch_server --kv-compress`` on the CPU.

    Parameters
    ----------
    extra : more flags.
    may_end : whether a test may end it.
    launcher : a module in the place of SGLang's.
    """
    port = free_port()
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    serve.set_defaults(environment, gpu=False, local_model=True)
    # Also on a machine with a GPU the server and its kernels are to use the CPU.
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = serve.server_command(
        model_path, "127.0.0.1", port, False, [*FLAGS, *extra]
    )
    command[command.index(LAUNCHER)] = launcher
    with log.open("wb") as out, pytest.MonkeyPatch.context() as patch:
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, "127.0.0.1")
        process = subprocess.Popen(
            command, env=environment, stdout=out, stderr=out, start_new_session=True
        )
        started = Server(f"http://127.0.0.1:{port}", model_path, process, log)
        watchdog = threading.Timer(START_S, process.kill)
        watchdog.start()
        try:
            # Meanwhile, on the other core: what the tests need is loaded.
            prompt(model_path, 0, 1)
            importlib.import_module("tests.engine.frontend")
            ready = serve.wait_until_ready(process, started.url)
            watchdog.cancel()
            assert ready, f"the server did not start:\n{tail(log)}"
            yield started
            assert may_end or process.poll() is None, f"the server ended:\n{tail(log)}"
        finally:
            watchdog.cancel()
            serve.stop(process)


def tail(log: Path) -> str:
    """End of the server's log."""
    return log.read_text(errors="replace")[-5000:]
