"""Several systems of one run at a time, each in a process of its own.

    python -m bench.quality.side_by_side --systems ours ours:allocation=layer \\
        ours:allocation=head --out FOLDER --deadline 500 --model DIR --preset table \\
        --engine max_total_tokens=2500000

What is not named here goes to ``bench.quality run``. An engine for a small model leaves
a GPU idle most of the time. Give engines a pool each: they share the memory; with
``--gpus 4`` they are dealt out to four. The methods of kvpress share a process, and its
prefills. Rate 1 is asked of the first system of a kind only. Results are
``FOLDER/quality_NAME.jsonl``, what was printed ``FOLDER/NAME.log``. The exit status is
the worst one; 3: samples are left.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.quality.plan import SAMPLES_LEFT, is_asked
from bench.quality.systems import PRESETS, RATES, parse_setting, parse_systems

KILLED = 124
"""Exit status of `timeout`."""
POLL = 0.2
PATIENCE = 60.0
"""Seconds after the deadline until a process that does not end is killed."""


def commands(
    systems: Sequence[str], rates: Sequence[str], folder: Path, rest: Sequence[str]
) -> dict[str, list[str]]:
    """What to run, by a name that files can have."""
    found: dict[str, list[str]] = {}
    parsed = parse_systems(systems)
    pairs = list(zip(systems, parsed, strict=True))
    for engine in dict.fromkeys(system.engine for system in parsed):
        words = [word for word, system in pairs if system.engine == engine]
        sharing = [system for system in parsed if system.engine == engine]
        # A run knows by itself what a system that never evicts is not asked.
        own = [
            rate
            for rate in rates
            if any(
                system.never_evicts or is_asked(system, parse_setting(rate), parsed)
                for system in sharing
            )
        ]
        name = re.sub(r"[^a-z0-9]+", "_", engine if len(words) > 1 else words[0])
        found[name] = [
            *(sys.executable, "-m", "bench.quality", "run", *rest),
            *("--systems", *words, "--rates", *own),
            *("--out", str(folder / f"quality_{name}.jsonl")),
        ]
    return found


def run_all(
    found: dict[str, list[str]],
    folder: Path,
    seconds: float | None,
    at_once: int | None = None,
    gpus: int = 0,
) -> int:
    """Run them in their order, so many at a time; the worst exit status.

    Each may take what is left of the time when it starts. With `gpus`, the first sees
    GPU 0, the next one GPU 1, and so on around.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    waiting, running = list(found), {}
    worst = 0
    while waiting or running:
        spent = time.monotonic() - begin
        left = None if seconds is None else seconds - spent
        if left is not None and left <= 0 and waiting:
            print(f"not started: {', '.join(waiting)}", flush=True)
            waiting, worst = [], max(worst, SAMPLES_LEFT)
        while waiting and len(running) < (at_once or len(found)):
            name = waiting.pop(0)
            command = found[name]
            if left is not None:
                command = [*command, "--deadline", f"{left:g}"]
            environ = dict(os.environ)
            if gpus:
                environ["CUDA_VISIBLE_DEVICES"] = str(list(found).index(name) % gpus)
            with (folder / f"{name}.log").open("w") as log:
                running[name] = subprocess.Popen(
                    command, stdout=log, stderr=log, env=environ
                )
        for name, process in list(running.items()):
            status = process.poll()
            if status is None and left is not None and left < -PATIENCE:
                process.kill()
                process.wait()
                status = KILLED
            if status is not None:
                del running[name]
                worst = max(worst, abs(status))
                said = f"{name}: exit {status}, {spent:.0f} s. "
                print(said + _last_words(folder / f"{name}.log"), flush=True)
        time.sleep(POLL)
    return worst


def _last_words(log: Path) -> str:
    lines = [
        line for line in log.read_text(errors="replace").split("\n") if line.strip()
    ]
    return lines[-1].rsplit("\r", 1)[-1].strip()[:120] if lines else ""


def main() -> int:
    """Parse what is ours, pass the rest on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--systems", nargs="+", default=list(PRESETS))
    parser.add_argument("--rates", nargs="+", default=list(RATES))
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--deadline", type=float, help="seconds")
    parser.add_argument("--gpus", type=int, default=0, help="deal them out to so many")
    parser.add_argument("--at-once", type=int, help="processes; default: all")
    args, rest = parser.parse_known_args()
    found = commands(args.systems, args.rates, args.out, rest)
    return run_all(found, args.out, args.deadline, args.at_once, args.gpus)


if __name__ == "__main__":
    raise SystemExit(main())
