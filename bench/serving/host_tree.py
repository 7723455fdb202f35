"""Host time of a scheduler step, by prefix tree.

    python -m bench.serving.host_tree
    python -m bench.serving.host_tree --systems stock,ours-rate-1 --pool 200000

Needs no GPU and no model. Every system is SGLang's real scheduler in a process of its
own, in which the forward answers at once (`host_tree_child`). All serve the same
requests: many running, many waiting, long shared prefixes, a pool full of prefixes
that nobody uses any more. What is timed is the CPU time of a step, not the clock on
the wall. Systems take turns in blocks of a few steps, and a block is compared with the
stock block of its round, so that what else the machine does falls on all of them.

One line a run goes to ``bench/results/host_tree.jsonl``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common.record import ROOT, environment, write_record
from bench.serving.child import Child
from bench.serving.host_tree_load import Shape

STOCK = "stock"
SYSTEMS: dict[str, dict[str, Any]] = {
    STOCK: {},
    "stock-page-1": {"page": 1},
    "stock-python": {"core": "python"},
    "plain-radix": {"tree": "plain"},
    "ours-rate-1": {"compress": True, "rate": 1},
    "ours-rate-4": {"compress": True, "rate": 4},
}
"""By name what differs from stock's default tree.

``page`` 1 is stock's own default, all others have pages of 16. ``core`` is that of the
unified tree. ``plain`` is SGLang's RadixCache in stock. With ``compress`` everything of
this package runs but its passes on the device.
"""
CORE_VARIABLE = "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND"
READY_SECONDS, BLOCK_SECONDS, FILL_SECONDS = 600.0, 600.0, 3600.0


def start(name: str, shape: Shape, folder: Path) -> tuple[Child, dict[str, Any]]:
    """A child that serves one system, and what it says about its tree."""
    system = {"tree": "default", "compress": False, "rate": None} | SYSTEMS[name]
    own = dataclasses.replace(shape, page=system.get("page", shape.page))
    child = Child(
        [
            *(sys.executable, "-m", "bench.serving.host_tree_child"),
            *("--system", json.dumps(system)),
            *("--shape", json.dumps(dataclasses.asdict(own))),
        ],
        folder / f"{name}.log",
        {
            CORE_VARIABLE: system.get("core", "rust"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONHASHSEED": "0",
        },
    )
    return child, child.wait(READY_SECONDS)


def block(child: Child, steps: int, queue: str, trace: bool = False) -> dict[str, Any]:
    """Let one system run some steps; `queue` is ``policy:waiting``."""
    policy, waiting = queue.split(":")
    command = {"op": "steps", "steps": steps, "policy": policy, "trace": trace}
    limit = max(BLOCK_SECONDS, FILL_SECONDS * steps / 10_000)
    return child.ask(command | {"waiting": int(waiting)}, limit)


def measure(
    children: dict[str, Child], queue: str, rounds: int, steps: int
) -> dict[str, list[dict[str, Any]]]:
    """Blocks by system; each round begins with another one, every fourth is traced."""
    names = list(children)
    blocks: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for name in names:
        block(children[name], steps, queue)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            trace = number % 4 == 3
            answer = block(children[name], steps, queue, trace)
            blocks[name].append(answer | {"traced": trace})
    return blocks


def mean_step(answer: dict[str, Any]) -> float:
    """Milliseconds of a step of one block, of both kinds."""
    times = answer["prefill"] + answer["decode"]
    return 1000 * sum(times) / len(times)


def summarize(
    blocks: dict[str, list[dict[str, Any]]], baseline: str = STOCK
) -> list[dict[str, Any]]:
    """One row a system: medians over blocks, and over rounds of ratios to stock."""
    rows = []
    timed = {n: [b for b in bs if not b["traced"]] for n, bs in blocks.items()}
    reference = [mean_step(answer) for answer in timed[baseline]]
    for name, answers in timed.items():
        means = [mean_step(answer) for answer in answers]
        ratios = [m / r for m, r in zip(means, reference, strict=True)]
        row: dict[str, Any] = {
            "system": name,
            "step_ms": statistics.median(means),
            # What a block takes while the machine has little else to do.
            "quiet_step_ms": quartiles(means)[0],
            "over_stock": statistics.median(ratios),
            "over_stock_quartiles": quartiles(ratios),
            "running": statistics.mean(a["running"] for a in answers),
            "waiting": answers[-1]["waiting"],
            "free": answers[-1]["free"],
            "evictable": answers[-1]["evictable"],
        }
        for kind in ("prefill", "decode"):
            steps = [t for answer in answers for t in answer[kind]]
            row[f"{kind}_steps"] = len(steps)
            row[f"{kind}_ms"] = 1000 * statistics.median(steps) if steps else None
        row |= tree_part([b for b in blocks[name] if b["traced"]])
        rows.append(row)
    return rows


def quartiles(values: list[float]) -> list[float]:
    """First and third quartile; with one value, that one twice."""
    if len(values) < 2:
        return [values[0], values[0]]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def tree_part(traced: list[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds that a step spends inside the tree, and in which of its calls."""
    if not traced:
        return {"tree_ms": None, "tree_us_by_call": {}, "tree_calls_a_step": {}}
    steps = sum(len(a["prefill"]) + len(a["decode"]) for a in traced)
    spent: dict[str, float] = {}
    calls: dict[str, int] = {}
    for answer in traced:
        for name, seconds in answer["spent"].items():
            spent[name] = spent.get(name, 0.0) + seconds
            calls[name] = calls.get(name, 0) + answer["calls"][name]
    used = [name for name in spent if calls[name]]
    # The median block, not the sum: a block may be disturbed.
    each = [
        1000 * sum(a["spent"].values()) / (len(a["prefill"]) + len(a["decode"]))
        for a in traced
    ]
    return {
        "tree_ms": statistics.median(each),
        "tree_us_by_call": {n: 1e6 * spent[n] / calls[n] for n in used},
        "tree_calls_a_step": {n: calls[n] / steps for n in used},
    }


def show(queue: str, rows: list[dict[str, Any]]) -> str:
    """A table in Markdown."""
    lines = [
        f"queue {queue}",
        "| system | tree | step, ms | quiet, ms | over stock (quartiles) "
        "| decode step, ms | prefill step, ms | inside the tree, ms a step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        low, high = row["over_stock_quartiles"]
        parts = [
            row["system"],
            row.get("tree", ""),
            f"{row['step_ms']:.2f}",
            f"{row['quiet_step_ms']:.2f}",
            f"{row['over_stock']:.3f} ({low:.3f} to {high:.3f})",
            *(number(row[key]) for key in ("decode_ms", "prefill_ms", "tree_ms")),
        ]
        lines.append("| " + " | ".join(parts) + " |")
    return "\n".join(lines)


def number(value: float | None) -> str:
    """Text of a number with two digits; a dash if there is none."""
    return "–" if value is None else f"{value:.2f}"


def cpu_name() -> str:
    """Name of the CPU, as the kernel calls it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument(
        "--waiting",
        default="fcfs:200,lpm:120",
        help="policy:requests. With more than 128 requests SGLang turns lpm into fcfs.",
    )
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--steps", type=int, default=60, help="of a block")
    parser.add_argument("--fill", type=int, help="steps before the first block")
    for field in dataclasses.fields(Shape):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    results = ROOT / "bench/results/host_tree.jsonl"
    parser.add_argument("--out", type=Path, default=results)
    args = parser.parse_args(words)
    args.systems, args.waiting = args.systems.split(","), args.waiting.split(",")
    unknown = set(args.systems) - set(SYSTEMS)
    if unknown or STOCK not in args.systems:
        parser.error(f"--systems needs {STOCK} and only {', '.join(SYSTEMS)}")
    return args


def main(words: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Start the systems, fill their pools, take turns, report."""
    args = parse_arguments(words)
    names = [field.name for field in dataclasses.fields(Shape)]
    shape = Shape(**{name: getattr(args, name) for name in names})
    children: dict[str, Child] = {}
    trees: dict[str, dict[str, Any]] = {}
    records = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in args.systems:
                children[name], trees[name] = start(name, shape, Path(folder))
                fill = shape.filling_steps if args.fill is None else args.fill
                block(children[name], fill, args.waiting[0])
                print(f"{name} runs: {trees[name]}", flush=True)
            for queue in args.waiting:
                rows = summarize(measure(children, queue, args.rounds, args.steps))
                for row in rows:
                    said = trees[row["system"]]
                    row |= {"tree": said["tree"], "core": said["core"]}
                print(show(queue, rows), flush=True)
                records.append(
                    {
                        **environment(),
                        "cpu": cpu_name(),
                        "load_average": os.getloadavg()[0],
                        "shape": dataclasses.asdict(shape),
                        "queue": queue,
                        "rounds": args.rounds,
                        "steps": args.steps,
                        "rows": rows,
                    }
                )
                write_record(args.out, records[-1])
        finally:
            for child in children.values():
                child.close()
    return records


if __name__ == "__main__":
    main()
