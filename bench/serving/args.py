"""The command line of `bench.serving`."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.common.record import ROOT
from bench.serving.loads import GROUPS


def parse_arguments(about: str | None) -> argparse.Namespace:
    """Arguments, checked; `about` is what ``--help`` says first."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--group", choices=(*GROUPS, "every"), default="")
    parser.add_argument("--loads", default="", help="ids, with commas")
    parser.add_argument("--rates", default="", help="only these, where a load has one")
    parser.add_argument("--systems", default="", help="only these, with commas")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--deadline", type=float, default=0, help="seconds; 0: none")
    parser.add_argument("--together", type=int, help="engines alive at once, at most")
    parser.add_argument("--limit", type=float, default=400, help="seconds of one run")
    parser.add_argument(
        "--skip-done", action="store_true", help="what --out has of this commit"
    )
    parser.add_argument("--table-only", action="store_true")
    parser.add_argument("--commits", default="", help="tabulate these as one: a,b")
    parser.add_argument("--device", default="", help="cpu: a trial of the machinery")
    parser.add_argument("--extra-args", default="{}", help="JSON, more engine keywords")
    parser.add_argument("--logs", type=Path, help="folder that keeps SGLang's logs")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/serve.jsonl")
    one = parser.add_argument_group("one load, without --group and --loads")
    one.add_argument("--requests", type=int, default=256)
    one.add_argument("--min-len", type=int, default=100)
    one.add_argument("--max-len", type=int, default=8000)
    one.add_argument("--output", type=int, default=256)
    one.add_argument("--pool", type=int, default=0, help="tokens; 0: all memory")
    one.add_argument("--rate", type=float, default=8)
    one.add_argument("--min-budget", type=int, default=512)
    one.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.table_only and not args.model:
        parser.error("--model is needed")
    return args
