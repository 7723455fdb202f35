"""Soak a real server with mixed HTTP load, bounded in time and count.

    python -m bench.soak --tiny                                     # CPU, minutes
    python -m bench.soak --requests 500                             # CPU, SmolLM2
    python -m bench.soak --model PATH --load-format dummy --pool 65536 \\
        --requests 5500 --seconds 240 --aborts 600 --leaves 300     # one GPU
    python -m bench.soak --model PATH --load-format dummy --hostile-itl
    python -m bench.soak --stock ...        # stock SGLang, our options left out
    python -m bench.soak --url http://127.0.0.1:30000 --pid 4711

It sends prompts of 1 to ``--max-len`` tokens with shared prefixes, options of single
requests, wrong ones, streams, aborts, clients that leave, bursts, several answers to a
prompt and, where the server has a tokenizer, the OpenAI API; small requests beside them
are timed. Afterwards the server has to be idle with every page free, to flush, and to
answer. The status is 1 if anything unexpected happened; the record goes to ``--out``.

``--hostile-itl`` measures what one client that sends refused requests and requests at
rate 1.01 as fast as it can does to the inter-token latency of ordinary streams. With
``--stock`` it is a client that sends the same prompts to SGLang as it comes.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.common.record import environment, write_record
from bench.common.server import (
    Server,
    ServerError,
    count_log,
    new_port,
    say,
    server_command,
)
from bench.soak.args import parse_arguments, set_device_defaults
from bench.soak.itl import format_phases, measure
from bench.soak.limits import Limits, limits_of
from bench.soak.load import Load
from bench.soak.report import format_soak
from bench.soak.run import Soak
from bench.soak.shape import Shape
from sglang_kvc.tools import serve
from sglang_kvc.tools.fetch_model import DEFAULT_MODEL, fetch


def open_server(args: argparse.Namespace, stack: ExitStack, gpu: bool) -> Server:
    """The server of ``--url``, or one that is started and stopped with `stack`."""
    if args.url:
        return Server(args.url, pid=args.pid)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    model = args.model
    if args.tiny:
        from tests.engine.tiny_model import write_tiny_model

        model = write_tiny_model(folder / "tiny")
    command = server_command(
        model or str(fetch(DEFAULT_MODEL)),
        new_port(),
        gpu,
        pool=args.pool,
        load_format=args.load_format,
        priority=args.priority,
        stock=args.stock,
        extra=args.extra,
    )
    say("starting " + " ".join(command[2:]))
    log = args.log or folder / "server.log"
    server = Server.start(command, log, gpu, args.start_limit)
    stack.callback(server.stop)
    return server


def soak(args: argparse.Namespace, server: Server, limits: Limits) -> dict[str, Any]:
    """Run the load; its record."""
    shape = Shape(
        requests=args.requests,
        max_len=min(args.max_len, limits.context - args.max_output - 2),
        max_output=args.max_output,
        aborts=args.aborts,
        leaves=args.leaves,
        seed=args.seed,
        without=args.without,
        stock=args.stock,
    )
    runner = Soak(
        server,
        Load(shape, limits),
        seconds=args.seconds,
        concurrency=args.concurrency,
        burst=args.burst,
        pause=args.pause,
        canary_every=args.canary_every,
        stall=args.stall,
        memory_every=min(args.memory_every, max(args.requests // 10, 1)),
    )
    values = asyncio.run(runner.run())
    return {**values, **count_log(server.log_text())}


def main() -> int:
    """Parse, start, load, record, tell; the exit status."""
    args = parse_arguments(__doc__)
    gpu = serve.has_gpu() if args.device is None else args.device == "gpu"
    with ExitStack() as stack:
        try:
            server = open_server(args, stack, gpu)
            limits = limits_of(server, args.structured)
        except (OSError, ServerError) as error:
            say(f"error: {error}")
            return 1
        set_device_defaults(args, gpu)
        say(f"ready: {limits}")
        if args.hostile_itl:
            values = measure(args, server, limits)
            table = format_phases(values)
        else:
            values = soak(args, server, limits)
            table = format_soak(values)
    settings = {
        name: sorted(value) if isinstance(value, frozenset) else value
        for name, value in vars(args).items()
        if not isinstance(value, Path) and name not in ("url", "model")
    }
    named = {"model": Path(args.model).name if args.model else args.tiny and "tiny"}
    write_record(
        args.out,
        {
            **environment(),
            "bench": "hostile-itl" if args.hostile_itl else "soak",
            **named,
            "settings": settings,
            "limits": vars(limits),
            **values,
        },
    )
    print(table)
    return 1 if values["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
