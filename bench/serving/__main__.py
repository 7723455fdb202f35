"""Serve loads with stock SGLang and with --kv-compress, and print one table.

    python -m bench.serving --model PATH --load-format dummy --group small \\
        --deadline 560
    python -m bench.serving --table-only
    python -m bench.serving --model PATH --requests 256 --min-len 100 --max-len 8000 \\
        --output 256 --pool 131072 --rate 8

``--group`` and ``--loads`` take loads of `loads`; without them one load is made
of the other arguments. Records are appended to ``--out`` as each run ends. "stock" runs
with the plugin not loaded, "absent" with the plugin and without its flag.

Engines with a small pool start together, since a start takes most of a minute, as many
as the GPU's memory holds (``--together``), and serve one load at a time; an idle engine
uses no GPU time. Engines with all memory, and those of 70B models unless ``--together``
is given, follow one by one. A run whose plugin was not in the expected state, and every
run of an engine that failed its idle check, count as failed.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from bench.common.gpu_memory import total_mib
from bench.serving import report
from bench.serving.args import parse_arguments
from bench.serving.loads import choose
from bench.serving.plan import (
    adhoc,
    chosen,
    engines_together,
    plan,
    supported,
    without_stock,
)
from bench.serving.session import Session


def main() -> None:
    """Parse arguments, run what they ask for, print the table."""
    args = parse_arguments(__doc__)
    red = False
    if not args.table_only:
        named = args.group or args.loads
        loads = choose(args.group, args.loads.split(",")) if named else [adhoc(args)]
        loads = chosen(loads, args.rates, args.systems if named else "")
        if args.device == "cpu":
            loads = [without_stock(load) for load in loads]
        with tempfile.TemporaryDirectory() as folder:
            logs = args.logs or Path(folder)
            logs.mkdir(parents=True, exist_ok=True)
            session = Session(args, logs)
            try:
                ready = [load for load in map(supported, loads) if load]
                together = args.together or engines_together(total_mib())
                asked = bool(args.together)
                for batch in plan(ready, args.repeats, together, large=asked):
                    session.batch(batch)
            finally:
                session.memory.stop()
            red = session.red
    records = report.merge_commits(report.read_records(args.out), args.commits)
    print(report.format_table(report.summarize(records)))
    if red:
        raise SystemExit("a check is red")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
