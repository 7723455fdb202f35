"""A server under load: start and stop it, ask it, read its memory and its log."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from bench.common.ports import free_ports
from bench.common.processes import family
from sglang_kvc.tools import serve

RETRACTED = re.compile(r"[Rr]etract.*#retracted_reqs: (\d+)")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
DEAD_TAIL = 4000


class ServerError(RuntimeError):
    """The server is gone, or does not answer as it should."""


def has_tokenizer(model: Path) -> bool:
    """Whether a model's folder has one; what is no folder is fetched with it."""
    return not model.is_dir() or any((model / f).exists() for f in TOKENIZER_FILES)


def server_command(
    model: str,
    port: int,
    gpu: bool,
    *,
    pool: int = 0,
    load_format: str = "auto",
    tokenizer: str = "",
    priority: bool = False,
    stock: bool = False,
    extra: Sequence[str] = (),
) -> list[str]:
    """The command that starts the server.

    Parameters
    ----------
    model : str
    port : int
    gpu : bool
        Without one, flags for the CPU are added.
    pool : int
        Tokens; 0 leaves it to SGLang (on the CPU to `sglang_kvc.tools.serve`).
    load_format : str
    tokenizer : str
        Folder of one; empty: the model's, or none if it has none.
    priority : bool
        Schedule by priority.
    stock : bool
        SGLang as it comes.
    extra : sequence of str
        More flags; they win.
    """
    flags = ["--load-format", load_format]
    if pool:
        flags += ["--max-total-tokens", str(pool)]
    if tokenizer:
        flags += ["--tokenizer-path", tokenizer]
    elif not has_tokenizer(Path(model)):
        flags += ["--skip-tokenizer-init"]
    if priority:
        flags += ["--enable-priority-scheduling", "--default-priority-value", "0"]
    command = serve.server_command(model, "127.0.0.1", port, gpu, [*flags, *extra])
    return [word for word in command if word != "--kv-compress" or not stock]


def count_log(text: str) -> dict[str, int]:
    """What a server's log says of retractions and of exceptions."""
    return {
        "retracted_by_log": sum(int(found) for found in RETRACTED.findall(text)),
        "tracebacks_in_log": text.count("Traceback (most recent call last)"),
    }


class Server:
    """A server that we started, or one at a URL.

    Parameters
    ----------
    url : str
    process : Popen, optional
        None for a server of somebody else's.
    log : Path, optional
        Its standard output and error.
    pid : int, optional
        For its memory, if it is somebody else's.
    """

    def __init__(
        self,
        url: str,
        process: subprocess.Popen[bytes] | None = None,
        log: Path | None = None,
        pid: int | None = None,
    ) -> None:
        self.url, self.process, self.log = url.rstrip("/"), process, log
        self.pid = process.pid if process else pid
        # A proxy meant for the outside world does not reach this machine.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    @classmethod
    def start(
        cls,
        command: list[str],
        log: Path,
        gpu: bool,
        limit: float,
        more: Mapping[str, str] | None = None,
    ) -> Server:
        """Start a server and wait until it is ready; `more` is its environment's."""
        environ = {**os.environ, **(more or {})}
        serve.set_defaults(environ, gpu, local_model=True)
        port = command[command.index("--port") + 1]
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, env=environ, stdout=out, stderr=out, start_new_session=True
            )
        server = cls(f"http://127.0.0.1:{port}", process, log)
        end = time.monotonic() + limit
        while time.monotonic() < end and server.alive():
            try:
                server.get("/health", 30)
                return server
            except (OSError, ServerError):
                time.sleep(1)
        server.stop()
        raise ServerError(f"the server did not start:\n{server.log_tail()}")

    def stop(self) -> None:
        """End a server that we started."""
        if self.process is not None:
            serve.stop(self.process)

    def alive(self) -> bool:
        """Whether its main process runs (True if we do not know it)."""
        return self.process is None or self.process.poll() is None

    def log_text(self) -> str:
        """The whole log; empty if it is somebody else's."""
        return self.log.read_text(errors="replace") if self.log else ""

    def log_tail(self) -> str:
        """End of the log."""
        return self.log_text()[-DEAD_TAIL:]

    def get(self, path: str, timeout: float = 60, post: bytes | None = None) -> Any:
        """Ask, and decode JSON if it is some.

        Raises
        ------
        ServerError
            If the status is not 200.
        OSError
            If there is no connection, or no answer in time.
        """
        request = urllib.request.Request(
            self.url + path, data=post, headers={"Content-Type": "application/json"}
        )
        try:
            with self._opener.open(request, timeout=timeout) as response:
                text = response.read().decode()
        except urllib.error.HTTPError as error:
            raise ServerError(f"{path}: {error.code} {error.read()[:300]!r}") from error
        try:
            return json.loads(text)
        except ValueError:
            return text

    def load(self) -> dict[str, Any]:
        """Requests and tokens of now, by the scheduler."""
        loads = self.get("/v1/loads")["loads"]
        return loads[0] if loads else {}

    def wait_idle(self, limit: float) -> dict[str, Any]:
        """Wait until it has nothing to do, twice in a row; the last load.

        Raises
        ------
        ServerError
            If it does not become idle.
        """
        end, calm, load = time.monotonic() + limit, 0, {}
        while time.monotonic() < end:
            load = self.load()
            busy = load["num_running_reqs"] + load["num_waiting_reqs"]
            calm = 0 if busy or load["num_used_tokens"] else calm + 1
            if calm == 2:
                return load
            time.sleep(0.5)
        raise ServerError(f"not idle after {limit:.0f} s: {json.dumps(load)}")

    def flush(self) -> None:
        """Drop the prefix cache.

        Raises
        ------
        ServerError
            If it is refused.
        """
        self.get("/flush_cache?timeout=30", 60, post=b"")

    def memory(self) -> dict[str, float]:
        """Resident MiB of each of its processes, by name."""
        if self.pid is None:
            return {}
        found: dict[str, float] = {}
        for process in family(self.pid):
            try:
                words = process.cmdline() or [process.name()]
                name = "http server" if process.pid == self.pid else _short(words)
                found[name] = found.get(name, 0) + process.memory_info().rss / 2**20
            except psutil.Error:
                continue
        return found

    def dump(self) -> str:
        """Text that a server says of itself, for a report of a hang."""
        parts = []
        for path in ("/v1/loads", "/health", "/server_info"):
            try:
                said = self.get(path, 30)
                if path == "/server_info":
                    said = said["internal_states"][0].get("memory_usage")
                parts.append(f"{path}: {json.dumps(said)}")
            except (OSError, ServerError, KeyError, TypeError) as error:
                parts.append(f"{path}: {type(error).__name__} {error}")
        return "\n".join([*parts, "end of the log:", self.log_tail()])


def _short(words: list[str]) -> str:
    """Short name of a process: ``sglang::scheduler``, or a Python helper's task."""
    line = " ".join(words)
    for mark in ("sglang::", "resource_tracker", "forkserver"):
        if mark in line:
            return line[line.index(mark) :].split()[0].split("(")[0].rstrip(",;")
    return Path(words[0]).name


def new_port() -> int:
    """A free port of the loopback."""
    return free_ports(1)[0]


def say(text: str) -> None:
    """One progress line."""
    print(text, file=sys.stderr, flush=True)
