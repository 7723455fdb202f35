"""What SGLang does besides, on one real server that compresses.

    python -m bench.features --model FOLDER --lora          # a GPU
    python -m bench.features --pool 3072                    # SmolLM2, without one
    python -m bench.features --model FOLDER --lora --stock  # our options left out
    python -m bench.features ... -- --kv-compress-sessions  # more flags of a server

LoRA adapters, JSON schemas and regular expressions, tool calls and reasoning, each
behind prompts that were compressed; at the end every page has to be free. Adapters need
a GPU: SGLang pins memory for them. They and the prompts are random and made here.
``--stock`` asks the same of SGLang without our plugin, less what it cannot do; that
needs a GPU, too. A check that fails does not keep the others from being made; the
status is then 1. The verdicts go to ``--out``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.common.record import environment, write_record
from bench.common.server import Server, ServerError, new_port, say, server_command
from bench.features import end_checks, lora_checks, parser_checks, structured_checks
from bench.features.adapters import lora_flags, write_adapter
from bench.features.args import parse_arguments
from bench.features.asking import Asker, Sizes
from bench.features.verdicts import Check, Verdict, judge_all, summary
from sglang_kvc.tools import serve
from sglang_kvc.tools.fetch_model import DEFAULT_MODEL, fetch

# A rate is to hold for prompts of a thousand tokens.
OURS = ("--kv-compress-min-budget", "128")
# Blanks without end would be JSON.
FLAGS = (
    "--constrained-json-disable-any-whitespace",
    *parser_checks.TOOL_FLAGS,
    *parser_checks.REASONING_FLAGS,
)


def open_server(
    args: argparse.Namespace, model: Path, gpu: bool, stack: ExitStack
) -> Server:
    """Write the adapters, and start a server that is stopped with `stack`."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    flags = [*FLAGS, *(() if args.stock else OURS)]
    if args.lora:
        written = {
            name: write_adapter(folder, model, name, args.lora_strength)
            for name in lora_checks.NAMES
        }
        flags += lora_flags(written, gpu)
    command = server_command(
        str(model),
        new_port(),
        gpu,
        pool=args.pool,
        stock=args.stock,
        extra=[*flags, *args.extra],
    )
    say("starting " + " ".join(command[2:]))
    log = args.log or folder / "server.log"
    plugins = {"SGLANG_PLUGINS": "none"} if args.stock else {}
    server = Server.start(command, log, gpu, args.start_limit, plugins)
    stack.callback(server.stop)
    return server


def chosen(lora: bool, only: str, stock: bool = False) -> list[Check]:
    """The checks to make; the last ones always."""
    first = [
        *(lora_checks.CHECKS if lora else ()),
        *structured_checks.CHECKS,
        *parser_checks.CHECKS,
    ]
    asked = [c for c in first if only in c.name and not (stock and c.ours)]
    return [*asked, *end_checks.CHECKS]


def record_of(
    args: argparse.Namespace, model: Path, sizes: Sizes, verdicts: Iterable[Verdict]
) -> dict[str, Any]:
    """The line that is written."""
    return {
        **environment(),
        "bench": "features",
        "model": model.name,
        "settings": {
            name: value
            for name, value in vars(args).items()
            if not isinstance(value, Path) and name != "model"
        },
        "sizes": vars(sizes),
        **summary(verdicts),
    }


def main() -> int:
    """Parse, start, check, record; the exit status."""
    args = parse_arguments(__doc__)
    gpu = serve.has_gpu() if args.device is None else args.device == "gpu"
    model = args.model or Path(fetch(DEFAULT_MODEL))
    with ExitStack() as stack:
        try:
            server = open_server(args, model, gpu, stack)
            info = server.get("/server_info")
        except (OSError, ServerError) as error:
            say(f"error: {error}")
            return 1
        sizes = Sizes.of(info["max_total_num_tokens"], info["max_req_input_len"])
        say(f"ready: {sizes}")
        asker = Asker(server, sizes, args.seed, args.wait, stock=args.stock)
        verdicts = judge_all(chosen(args.lora, args.only, args.stock), asker)
        if not all(verdict.passed for verdict in verdicts):
            say(server.log_tail())
    record = record_of(args, model, sizes, verdicts)
    write_record(args.out, record)
    passed = record["checks"] - len(record["failed"])
    print("\n".join(verdict.line() for verdict in verdicts))
    print(f"{passed} of {record['checks']} checks passed")
    return 1 if record["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
