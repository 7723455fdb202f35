"""Serve one load with stock SGLang and with --kv-compress, and print one table.

    python -m bench.serve --model PATH [--load-format dummy] --requests 256 \
        --min-len 100 --max-len 8000 --output 256 --pool 131072 --rate 8

Each system runs in a process of its own, one after the other, on the same prompts and
output lengths. Results are appended to ``bench/results/serve.jsonl`` (or ``--out``).
A run whose plugin was not active, or whose idle check failed, prints no figure.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.record import environment, write_record

RUNNING = re.compile(r"#running-req: (\d+)")
IDLE_SECONDS = 3.0


def prompts(args: argparse.Namespace, vocab: int) -> list[list[int]]:
    """Random token ids, lengths uniform in [min_len, max_len]; seeded."""
    rng = random.Random(args.seed)
    lengths = [rng.randint(args.min_len, args.max_len) for _ in range(args.requests)]
    return [[rng.randrange(10, vocab - 10) for _ in range(n)] for n in lengths]


def engine_arguments(args: argparse.Namespace, system: str) -> dict[str, Any]:
    """Keyword arguments of sglang.Engine; both systems get the same ones."""
    kwargs: dict[str, Any] = {
        "model_path": args.model,
        "load_format": args.load_format,
        "skip_tokenizer_init": True,
        "skip_server_warmup": True,
        "log_level": "info",
        "decode_log_interval": 4,
        "max_running_requests": 256,
        "cuda_graph_backend_prefill": "disabled",
        "random_seed": 0,
    }
    if args.pool:
        kwargs["max_total_tokens"] = args.pool
    if system != "stock":
        kwargs |= {"kv_compress": True, "kv_compress_min_budget": args.min_budget}
        kwargs["kv_compress_rate"] = float(args.rate)
    return kwargs


def child(args: argparse.Namespace) -> None:
    """Run one system; writes its figures to ``args.out``."""
    import sglang

    started = time.perf_counter()
    engine = sglang.Engine(**engine_arguments(args, args.system))
    ready = time.perf_counter() - started
    config = json.loads((Path(args.model) / "config.json").read_text())
    ids = prompts(args, config["vocab_size"])
    params = {"max_new_tokens": args.output, "ignore_eos": True, "temperature": 0.0}
    engine.generate(input_ids=ids[:2], sampling_params={**params, "max_new_tokens": 8})
    engine.flush_cache()
    begin = time.perf_counter()
    outputs = engine.generate(input_ids=ids, sampling_params=params)
    seconds = time.perf_counter() - begin
    # The scheduler checks its memory when it is idle and dies on a leak.
    time.sleep(IDLE_SECONDS)
    alive = engine.generate(input_ids=ids[0][:32], sampling_params=params)
    info = [out["meta_info"] for out in outputs]
    compress = [m["kv_compress"] for m in info if "kv_compress" in m]
    tokens = sum(map(len, ids)) + args.output * len(ids)
    result = {
        "system": args.system,
        "ready_s": ready,
        "seconds": seconds,
        "requests_per_s": len(ids) / seconds,
        "tokens_per_s": tokens / seconds,
        "completed": sum(m["completion_tokens"] == args.output for m in info),
        "alive_after_idle": len(alive["output_ids"]) == args.output,
        "logical_tokens": sum(map(len, ids)) / len(ids) + args.output,
        "plugin_active": len(compress) == len(ids),
    }
    if compress:
        for key in ("resident_tokens", "peak_resident_tokens"):
            result[key] = sum(c[key] for c in compress) / len(compress)
        for key in ("passes", "deferred_passes"):
            result[key] = sum(c[key] for c in compress)
    Path(args.out).write_text(json.dumps(result))
    engine.shutdown()


def run_system(
    args: argparse.Namespace, argv: list[str], system: str
) -> dict[str, Any]:
    """Run `child` in its own process; adds what its log shows."""
    with tempfile.TemporaryDirectory() as folder:
        target, log = Path(folder) / "result.json", Path(folder) / "log"
        command = [sys.executable, "-m", "bench.serve", *argv]
        command += ["--system", system, "--out", str(target)]
        with log.open("w") as stream:
            subprocess.run(
                command, stdout=stream, stderr=stream, check=False, timeout=args.limit
            )
        text = log.read_text()
        if not target.exists():
            raise SystemExit(f"{system} failed; end of its log:\n{text[-6000:]}")
        result: dict[str, Any] = json.loads(target.read_text())
    result["largest_batch"] = max(map(int, RUNNING.findall(text)), default=0)
    result["retractions"] = text.count("KV cache pool is full. Retract requests")
    result["metadata"] = next(
        (line for line in text.splitlines() if "KV-Compress metadata" in line), ""
    ).partition("KV-Compress metadata: ")[2]
    problems = []
    if result["completed"] != args.requests or not result["alive_after_idle"]:
        problems.append("requests or the idle check failed")
    if result["plugin_active"] != (system != "stock"):
        problems.append("the plugin was not in the expected state")
    if problems:
        raise SystemExit(f"{system}: {'; '.join(problems)}\n{text[-4000:]}")
    return result


def main() -> None:
    """Parse arguments; run both systems, or one of them as a child."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--min-len", type=int, default=100)
    parser.add_argument("--max-len", type=int, default=8000)
    parser.add_argument("--output", type=int, default=256)
    parser.add_argument("--pool", type=int, default=0, help="tokens; 0: all memory")
    parser.add_argument("--rate", type=float, default=8)
    parser.add_argument("--min-budget", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=400, help="seconds a system")
    parser.add_argument("--systems", default="stock,kvc")
    parser.add_argument("--system", default="")
    parser.add_argument("--out", default="bench/results/serve.jsonl")
    args = parser.parse_args()
    if args.system:
        child(args)
        return
    argv = list(sys.argv[1:])
    if "--out" in argv:
        at = argv.index("--out")
        del argv[at : at + 2]
    rows = []
    for system in args.systems.split(","):
        print(f"running {system} ...", flush=True)
        row = run_system(args, argv, system)
        settings = {**vars(args), "model": Path(args.model).name}
        del settings["out"], settings["system"]
        write_record(Path(args.out), {**environment(), "args": settings, **row})
        rows.append(row)
        print_table(rows)


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line a system; ratios to the first."""
    head = ("system", "ready s", "seconds", "req/s", "tok/s", "batch", "resident", "x")
    print("".join(f"{name:>12}" for name in head))
    for row in rows:
        ratio = rows[0]["seconds"] / row["seconds"]
        resident = row.get("resident_tokens", row["logical_tokens"])
        print(
            f"{row['system']:>12}{row['ready_s']:>12.1f}{row['seconds']:>12.1f}"
            f"{row['requests_per_s']:>12.2f}{row['tokens_per_s']:>12.0f}"
            f"{row['largest_batch']:>12}{resident:>12.0f}{ratio:>12.2f}"
        )
        if row.get("metadata"):
            print("    ", row["metadata"])


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
