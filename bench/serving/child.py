"""The parent's end of a process that answers JSON lines, such as `engine`.

Standard output and error of the child are a file that is read between two positions.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.common.processes import family


class ChildError(RuntimeError):
    """The child reported a failure, died or did not answer in time."""


def start_engine(
    keywords: dict[str, Any],
    log: Path,
    *,
    port: int,
    stock: bool,
    gpus: Iterable[int] = (),
) -> Child:
    """An engine in a process of its own, with our plugin or, `stock`, without.

    `port` is for its ranks; `gpus` are those that it sees; none: all.
    """
    # Replicas choose ports themselves: all would listen on this one.
    if keywords.get("dp_size", 1) == 1:
        keywords = {**keywords, "nccl_port": port}
    command = [sys.executable, "-m", "bench.serving.engine"]
    environ = {"SGLANG_PLUGINS": "none" if stock else "kvcompress"}
    if seen := ",".join(map(str, gpus)):
        environ["CUDA_VISIBLE_DEVICES"] = seen
    return Child([*command, "--engine", json.dumps(keywords)], log, environ)


class Child:
    """The parent's end.

    Parameters
    ----------
    command : list of str
        Starts the child; ``--answer-fd N`` is appended.
    log : Path
        Receives standard output and error.
    environ : dict
        Added to the environment.
    """

    def __init__(self, command: list[str], log: Path, environ: dict[str, str]) -> None:
        self.log = log
        self._buffer = b""
        self._fd, answer = os.pipe()
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [*command, "--answer-fd", str(answer)],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=stream,
                pass_fds=[answer],
                env={**os.environ, **environ},
            )
        os.close(answer)

    def position(self) -> int:
        """Bytes of the log so far."""
        return self.log.stat().st_size

    def read_log(self, begin: int = 0) -> str:
        """The log from byte `begin` on."""
        with self.log.open("rb") as stream:
            stream.seek(begin)
            return stream.read().decode(errors="replace")

    def ask(self, command: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Send one command and wait for its answer.

        Raises
        ------
        ChildError
            With the end of the log if the child is gone, late, or failed.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as problem:
            raise self._error(f"gone before {command['op']}") from problem
        return self.wait(timeout, str(command["op"]))

    def wait(self, timeout: float, what: str = "ready") -> dict[str, Any]:
        """The next answer."""
        limit = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._fd, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left = max(0.0, limit - time.monotonic())
                # Once more: a wait that was stopped for longer finds nothing.
                if not selector.select(left) and not selector.select(0):
                    raise self._error(f"no answer to {what} in {timeout:.0f} s")
                part = os.read(self._fd, 1 << 16)
                if not part:
                    raise self._error(f"died at {what}")
                self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise self._error(f"{what}: {answer['error']}")
        return answer

    def close(self, timeout: float = 30.0) -> None:
        """Ask the child to quit; end it and what it started if it does not."""
        assert self.process.stdin is not None
        # What is left in the pipe may meet a dead child.
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            for process in family(self.process.pid):
                process.kill()
            self.process.wait()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _error(self, reason: str) -> ChildError:
        return ChildError(f"{reason}; end of the log:\n{self.read_log()[-3000:]}")
