"""The command line of `bench.serving.conversations`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.common.arguments import parse_before_dashes
from bench.common.record import ROOT
from bench.serving.conversations.load import Shape
from bench.serving.conversations.systems import parse_systems

SYSTEMS = "stock,stock-fp8,stock-host,ours-4,sessions-4,sessions-8"
WHOLE = 16
"""Conversations that the pool holds whole, unless ``--pool`` says something else."""
OUT = ROOT / "bench/results/conversations.jsonl"


def parse_arguments(
    about: str | None, words: Sequence[str] | None = None
) -> argparse.Namespace:
    """Arguments, checked; what follows ``--`` goes to every server (`extra`)."""
    parser = argparse.ArgumentParser(
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="What follows -- goes to sglang.launch_server.",
    )
    add = parser.add_argument
    add("--model", default="", help="folder; default: SmolLM2-135M-Instruct")
    add("--load-format", default="auto")
    add("--tokenizer-path", default="", help="default: the model's, else one made here")
    add("--systems", type=parse_systems, default=SYSTEMS, help="with commas")
    add("--sessions", type=int, default=128)
    add("--turns", type=int, default=6)
    add("--first", type=int, default=8000, help="tokens of the document of turn 1")
    add("--user", type=int, default=300, help="tokens that the user adds a turn")
    add("--answer", type=int, default=200, help="tokens of every answer")
    add("--think", type=float, default=5.0, help="mean seconds before a turn")
    add("--forks", type=float, default=0.125, help="share of sessions with two ways")
    add("--seed", type=int, default=0)
    add("--pool", type=int, default=0, help=f"bf16 tokens; 0: {WHOLE} whole sessions")
    add("--min-budget", type=int, help="of ours; default: what ours has by default")
    add("--host-ratio", type=float, default=2.0, help="host memory by pool")
    add("--seconds", type=float, default=600.0, help="of one system, at most")
    add("--stall", type=float, default=180.0, help="seconds without a token, at most")
    add("--start-limit", type=float, default=600.0, help="seconds of a start, at most")
    add("--together", type=int, default=1, help="servers alive; one is timed at once")
    add("--device", choices=("cpu", "gpu"), help="default: what there is")
    add("--table-only", action="store_true")
    add("--plot", type=Path, metavar="FOLDER", help="draw it, too")
    add("--commit", default="", help="tabulate this one; default: the newest")
    add("--logs", type=Path, help="folder that keeps the servers' logs")
    add("--out", type=Path, default=OUT)
    args, args.extra = parse_before_dashes(parser, words)
    if min(args.sessions, args.turns, args.first, args.user, args.answer) < 1:
        parser.error("sessions, turns and lengths are at least 1")
    if not 0 <= args.forks <= 1 or args.think < 0:
        parser.error("--forks is from 0 to 1, --think not below 0")
    args.shape = Shape(
        **{name: getattr(args, name) for name in Shape.__dataclass_fields__}
    )
    args.pool = args.pool or WHOLE * args.shape.length
    return args
