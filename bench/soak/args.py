"""The command line of `bench.soak`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.common.arguments import parse_before_dashes
from bench.common.record import ROOT

# Of a GPU and of the CPU, where a server decodes some tens of tokens per second.
DEFAULTS = {
    "seconds": (300.0, 1200.0),
    "concurrency": (128, 12),
    "max_len": (16_000, 600),
    "max_output": (600, 24),
    "stall": (120.0, 600.0),
    "canary_every": (1.0, 10.0),
    "phase_seconds": (30.0, 60.0),
    "stream_tokens": (256, 32),
    "stream_len": ([500, 2000], [50, 200]),
}


def parse_arguments(
    about: str | None, words: Sequence[str] | None = None
) -> argparse.Namespace:
    """Arguments; what was not given and depends on the device stays None.

    What follows ``--`` goes to the server.
    """
    parser = argparse.ArgumentParser(
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="What follows -- goes to sglang.launch_server.",
    )
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="folder; default: SmolLM2-135M-Instruct")
    which.add_argument("--tiny", action="store_true", help="a random model, made here")
    which.add_argument("--url", help="of a server that runs already")
    add("--pid", type=int, help="with --url: whose memory is watched")
    add("--load-format", default="auto")
    add("--pool", type=int, default=0, help="tokens; 0: all memory")
    add("--priority", action="store_true", help="start with priority scheduling")
    add("--stock", action="store_true", help="SGLang without this package beside it")
    add("--device", choices=("cpu", "gpu"), help="default: what there is")
    add("--requests", type=int, default=1000)
    add("--seconds", type=float, help="nothing is sent after so long")
    add("--concurrency", type=int)
    add("--burst", type=int, default=250, help="requests between two bursts")
    add("--pause", type=float, default=0.5, help="seconds before a burst")
    add("--max-len", type=int)
    add("--max-output", type=int)
    add("--aborts", type=int, help="requests to abort; default: a tenth")
    add("--leaves", type=int, help="clients that leave; default: a twentieth")
    structured = argparse.BooleanOptionalAction
    add("--structured", action=structured, default=None, help="JSON and regex")
    add("--without", default="", help="kinds not to send, with commas")
    add("--canary-every", type=float, help="seconds between small requests")
    add("--stall", type=float, help="seconds without a token that are too many")
    add("--memory-every", type=int, default=1000, help="requests between two samples")
    add("--start-limit", type=float, default=400)
    add("--seed", type=int, default=0)
    add("--log", type=Path, help="file that keeps the server's log")
    add("--out", type=Path, default=ROOT / "bench/results/soak.jsonl")
    itl = parser.add_argument_group("one hostile client beside ordinary streams")
    itl.add_argument("--hostile-itl", action="store_true")
    itl.add_argument("--streams", type=int, default=16)
    itl.add_argument("--phase-seconds", type=float)
    itl.add_argument("--phases", nargs="+", help="which of them; default: all")
    itl.add_argument("--stream-tokens", type=int, help="mean output of a request")
    itl.add_argument("--stream-len", type=int, nargs=2, metavar=("LOW", "HIGH"))
    itl.add_argument(
        "--hostile-len",
        type=int,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="prompts at rate 1.01; default: as the streams'",
    )
    known, extra = parse_before_dashes(parser, words)
    known.extra = extra
    known.aborts = known.requests // 10 if known.aborts is None else known.aborts
    known.leaves = known.requests // 20 if known.leaves is None else known.leaves
    if known.aborts + known.leaves > known.requests * 0.8:
        parser.error("--aborts and --leaves are more than 0.8 of --requests")
    known.without = frozenset(w.strip() for w in known.without.split(",") if w.strip())
    return known


def set_device_defaults(args: argparse.Namespace, gpu: bool) -> None:
    """Fill in what depends on the device."""
    for name, (on_gpu, on_cpu) in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, on_gpu if gpu else on_cpu)
    args.hostile_len = args.hostile_len or args.stream_len
