"""Serve conversations with several systems at equal KV bytes, and print one table.

    python -m bench.serving.conversations --sessions 4 --turns 3 --first 200 \\
        --user 40 --answer 24 --systems stock,sessions-4            # CPU, SmolLM2
    python -m bench.serving.conversations --model bench/shapes/llama-3.1-8b \\
        --load-format dummy                                         # one GPU
    python -m bench.serving.conversations --table-only [--plot docs/plots]

All sessions are alive from the beginning; each waits for its answer, thinks and goes
on. Prompts are token ids, so that a turn's prompt is exactly what has been said. The
pool holds 16 of the default's 128 conversations whole. ``--systems`` takes names of
`systems`; calls that append to one ``--out`` share a table. "stock" runs with the
plugin not loaded (on a CPU, where SGLang needs it, with the flag absent). A run in
which a turn failed, the server died or the plugin was not in the expected state counts
as failed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.common.record import environment, read_lines, write_record
from bench.common.server import (
    Server,
    ServerError,
    count_log,
    has_tokenizer,
    new_port,
    say,
    server_command,
)
from bench.serving.conversations.args import parse_arguments
from bench.serving.conversations.drive import Drive
from bench.serving.conversations.figures import (
    counters,
    host_cache_gb,
    summarize,
    wrong_side,
)
from bench.serving.conversations.load import Load
from bench.serving.conversations.plot import draw
from bench.serving.conversations.systems import System
from bench.serving.conversations.table import comparable, failed, format_table
from bench.serving.conversations.vocabulary import vocabulary_size, write_tokenizer
from bench.serving.log import parse_log, parse_start
from sglang_kvc.tools import serve
from sglang_kvc.tools.fetch_model import DEFAULT_MODEL, fetch

IDLE_S = 120.0


class Comparison:
    """The systems of one command line, one after another.

    Parameters
    ----------
    args : Namespace
    logs, folder : Path
        For the servers' logs, and for a tokenizer.
    """

    def __init__(self, args: argparse.Namespace, logs: Path, folder: Path) -> None:
        self.args, self.logs = args, logs
        self.gpu = serve.has_gpu() if args.device is None else args.device == "gpu"
        self.model = Path(args.model or fetch(DEFAULT_MODEL))
        vocab = vocabulary_size(self.model)
        self.load = Load(args.shape, vocab)
        self.tokenizer = args.tokenizer_path
        if not self.tokenizer and not has_tokenizer(self.model):
            self.tokenizer = str(write_tokenizer(folder / "tokenizer", vocab))

    def run(self) -> bool:
        """Measure and record all systems; whether all of them are green."""
        systems, step = self.args.systems, self.args.together
        green = True
        for at in range(0, len(systems), step):
            batch = systems[at : at + step]
            with ThreadPoolExecutor(len(batch)) as pool:
                started = list(pool.map(self._start, batch))
            try:
                for system, server in zip(batch, started, strict=True):
                    record = self._measure(system, server)
                    write_record(self.args.out, record)
                    say(f"{system.name}: {failed(record) or 'done'}")
                    green = green and not failed(record)
            finally:
                for one in started:
                    if isinstance(one, Server):
                        one.stop()
        return green

    def _command(self, system: System) -> list[str]:
        flags = ["--enable-cache-report", "--enable-metrics"]
        flags += system.flags(self.args.host_ratio, self.args.min_budget)
        return server_command(
            str(self.model),
            new_port(),
            self.gpu,
            pool=system.pool(self.args.pool),
            load_format=self.args.load_format,
            tokenizer=self.tokenizer,
            stock=system.stock,
            extra=[*flags, *self.args.extra],
        )

    def _start(self, system: System) -> Server | str:
        """A server that is ready, or what went wrong."""
        command = self._command(system)
        say(f"{system.name}: starting " + " ".join(command[2:]))
        # SGLang's PyPI build serves on a CPU only with our plugin loaded.
        away = system.stock and self.gpu
        try:
            return Server.start(
                command,
                self.logs / f"{system.name}.log",
                self.gpu,
                self.args.start_limit,
                {"SGLANG_PLUGINS": "none" if away else "kvcompress"},
            )
        except (OSError, ServerError) as error:
            return f"{type(error).__name__}: {error}"

    def _measure(self, system: System, server: Server | str) -> dict[str, Any]:
        """The record of one system, whatever becomes of it."""
        record = {
            **environment(),
            "bench": "conversations",
            "system": system.name,
            "kind": system.kind,
            "rate": system.rate,
            "stock": system.stock,
            "model": self.model.name,
            "shape": self.load.shape.record(),
            "pool": self.args.pool,
            "min_budget": self.args.min_budget,
            "host_ratio": self.args.host_ratio,
            "extra": self.args.extra,
        }
        if isinstance(server, str):
            return {**record, "error": server}
        values: dict[str, Any] = {}
        try:
            self._serve(system, server, values)
        except Exception as problem:
            # Whatever it is, the record says so, and the next system has its turn.
            values["error"] = f"{type(problem).__name__}: {problem}"
        if not server.alive():
            values["error"] = f"the server died; end of its log:\n{server.log_tail()}"
        return {**record, **values}

    def _serve(self, system: System, server: Server, values: dict[str, Any]) -> None:
        """Fill in the figures of a run, as far as it comes."""
        args = self.args
        start = server.log_text()
        values |= {**parse_start(start), "host_cache_gb": host_cache_gb(start)}
        drive = Drive(server, self.load, seconds=args.seconds, stall=args.stall)
        say(f"{system.name}: warming up")
        if bad := [turn.error for turn in asyncio.run(drive.warm_up()) if turn.error]:
            raise ServerError(f"the warm-up failed: {bad[0]}")
        values["not_idle"] = idle(server, system)
        if not values["not_idle"]:
            server.flush()
        before = counters(server.get("/metrics"))
        say(f"{system.name}: serving {self.load.shape.all_turns} turns")
        asyncio.run(drive.run())
        values |= summarize(drive.turns, self.load.shape.all_turns, drive.begin)
        if not server.alive():
            return
        values["not_idle"] = idle(server, system) or values["not_idle"]
        after = counters(server.get("/metrics"))
        since_start = ("snapshot_hits", "snapshot_evictions", "snapshots_brought_back")
        for name in since_start:
            if name in after:
                after[name] -= before.get(name, 0)
        said = server.log_text()[len(start) :]
        values |= {
            **after,
            **count_log(said),
            **parse_log(said),
            "processes_mib": {n: round(v) for n, v in server.memory().items()},
        }
        if wrong := wrong_side(values, system.stock):
            values["error"] = wrong


def idle(server: Server, system: System) -> str:
    """Wait until a server has given back all that no cache holds.

    Returns
    -------
    str
        Why stock SGLang has not; empty if it has. Of ours it is an error.
    """
    try:
        server.wait_idle(IDLE_S)
    except ServerError as error:
        if not system.stock:
            raise
        return str(error)
    return ""


def main() -> int:
    """Measure what is asked for, print the table; 1 if anything is red."""
    args = parse_arguments(__doc__)
    green = True
    if not args.table_only:
        with tempfile.TemporaryDirectory() as folder:
            logs = args.logs or Path(folder)
            logs.mkdir(parents=True, exist_ok=True)
            green = Comparison(args, logs, Path(folder)).run()
    records = [one for one in read_lines(args.out) if "system" in one]
    records = comparable(records, args.commit)
    print(format_table(records))
    if args.plot:
        draw(records, args.plot, args.out.name)
    return 0 if green else 1


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
