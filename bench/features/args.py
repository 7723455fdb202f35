"""The command line of `bench.features`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.common.arguments import parse_before_dashes
from bench.common.record import ROOT
from bench.features.adapters import STRENGTH

OURS = "--kv-compress"
"""How our flags begin; stock SGLang knows none of them."""


def parse_arguments(
    about: str | None, words: Sequence[str] | None = None
) -> argparse.Namespace:
    """Arguments; what follows ``--`` goes to the server, as `extra`."""
    parser = argparse.ArgumentParser(
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="What follows -- goes to sglang.launch_server.",
    )
    add = parser.add_argument
    add("--model", type=Path, help="folder; default: SmolLM2-135M-Instruct")
    add("--lora", action="store_true", help="serve two random adapters beside it")
    add("--lora-strength", type=float, default=STRENGTH, help="of these adapters")
    add("--stock", action="store_true", help="SGLang without this package beside it")
    add("--pool", type=int, default=6144, help="tokens")
    add("--device", choices=("cpu", "gpu"), help="default: what there is")
    add("--only", default="", help="checks whose names contain this, and the last ones")
    add("--seed", type=int, default=0)
    add("--wait", type=float, default=300, help="seconds that an answer may take")
    add("--start-limit", type=float, default=400)
    add("--log", type=Path, help="file that keeps the server's log")
    add("--out", type=Path, default=ROOT / "bench/results/features.jsonl")
    known, known.extra = parse_before_dashes(parser, words)
    if known.stock and any(word.startswith(OURS) for word in known.extra):
        parser.error(f"--stock: no {OURS}... behind --")
    return known
