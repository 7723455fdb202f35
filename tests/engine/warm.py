"""Processes that begin with SGLang imported.

There is one scheduler a process, so some tests need processes of their own. Importing
SGLang takes 15 to 20 s of CPU each time. `run` forks from a server that has imported it
once for all of a pytest run, as the ranks of `ranks.py` are forked. HTTP servers are
started as their users start them.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path

SHOWN = 4000
"""Characters of a log that a failed test shows."""


def run(
    module: str,
    *words: str | Path,
    log: Path,
    environ: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> str:
    """``python -m MODULE WORDS`` to its end; the end of what it wrote.

    Parameters
    ----------
    log : is written: standard output and error.
    environ : added to the environment that this process has now.
    timeout : seconds; then the process is killed.
    """
    # Not from this process: it has threads, and a scheduler.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.engine.preloaded"])
    wanted = {**os.environ, **(environ or {})}
    process = context.Process(
        target=_main, args=(module, [str(word) for word in words], str(log), wanted)
    )
    process.start()
    try:
        process.join(timeout)
    finally:
        process.kill()
        process.join()
    return log.read_text(errors="replace")[-SHOWN:] if log.exists() else ""


def _main(module: str, words: list[str], log: str, environ: dict[str, str]) -> None:
    with open(log, "w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
