"""Passkey retrieval through the served engine: which rates still find the key.

    python -m bench.serving.passkey --model PATH --lengths 4096,8192 --rates 1,2,4,8
    python -m bench.serving.passkey --model PATH --lengths 60000 --yarn 4 \\
        --pool 20480 --rates 8,16 --keys 3 --full

The question is inside the prompt. One engine serves every rate (a per-request option),
one batch per length and rate. With ``--pool`` the prompts may be longer than the KV
pool: the run fails unless each of them was then compressed between its chunks.
``--full`` asks the same without compression, in an engine of its own if there is a
pool limit: what the model can do. Tables go to ``bench/results/passkey.jsonl``, too.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common.record import environment, write_record
from bench.serving.passkey_prompts import Case, make_cases
from sglang_kvc.config.options import CHUNK_MODES, CHUNK_QUERIES, KVCompressOptions
from sglang_kvc.tools import serve

FULL = 0.0
"""Stands for the full cache among the rates; a rate is at least 1."""


def yarn_overrides(config: Any, factor: float) -> dict[str, Any]:
    """What to change in a model's config for a context `factor` times as long.

    SGLang replaces whole attributes, so the rotary base has to be repeated; a
    `rope_scaling` without it ends in a KeyError. The new context length is stated as
    the model's own: a longer one would read rotary rows that are not YaRN's.
    """
    rope, context = config.rope_parameters, config.max_position_embeddings
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"--yarn: the model already has {rope['rope_type']} scaling")
    return {
        "rope_parameters": {
            "rope_theta": rope["rope_theta"],
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": context,
        },
        "max_position_embeddings": int(context * factor),
    }


def engine_keywords(
    args: argparse.Namespace, pool: int | None, gpu: bool
) -> dict[str, Any]:
    """Keywords of ``sglang.Engine``; `pool` None leaves its size to SGLang."""
    keywords: dict[str, Any] = {
        "model_path": args.model,
        "kv_compress": True,
        "kv_compress_chunks": args.chunks,
        "kv_compress_chunk_queries": args.chunk_queries,
        "kv_compress_min_budget": args.min_budget,
        "skip_server_warmup": True,
        "random_seed": args.seed,
    }
    if args.yarn:
        from transformers import AutoConfig

        overrides = yarn_overrides(AutoConfig.from_pretrained(args.model), args.yarn)
        keywords["json_model_override_args"] = json.dumps(overrides)
    if not gpu:
        # SGLang would size the pool by the memory of the machine.
        keywords |= {"device": "cpu", "dtype": "float32", "max_running_requests": 16}
        pool = pool or serve.CPU_POOL_TOKENS
    if pool:
        keywords["max_total_tokens"] = pool
    return keywords


def sampling_params(rate: float) -> dict[str, Any]:
    """Greedy, with the rate as an option of the request."""
    option = {"enabled": False} if rate == FULL else {"rate": rate}
    custom = {"kv_compress": option}
    return {"max_new_tokens": 16, "temperature": 0.0, "custom_params": custom}


def engine_plan(args: argparse.Namespace) -> list[tuple[int | None, list[float]]]:
    """Pool and rates of each engine, one after the other."""
    if args.full and args.pool:
        return [(args.pool, args.rates), (None, [FULL])]
    return [(args.pool, [*args.rates, FULL] if args.full else args.rates)]


def ask(
    args: argparse.Namespace, cases: list[Case], pool: int | None, rates: list[float]
) -> list[dict[str, Any]]:
    """Start an engine, send every case at every rate, return the cells."""
    import sglang

    engine = sglang.Engine(**engine_keywords(args, pool, serve.has_gpu()))
    cells: list[dict[str, Any]] = []
    try:
        size = engine.get_server_info()["max_total_num_tokens"]
        if pool and size > pool:
            raise RuntimeError(f"asked for a pool of {pool} tokens, got {size}")
        # Kernels are compiled at their first use; that is no cost of a prompt.
        engine.generate(
            input_ids=cases[-1].ids, sampling_params=sampling_params(rates[0])
        )
        for rate in rates:
            for length in args.lengths:
                batch = [case for case in cases if case.length == length]
                # Every rate computes its own prefixes. The last step may still run.
                for _ in range(100):
                    if engine.flush_cache().success:
                        break
                    time.sleep(0.1)
                ids = [case.ids for case in batch]
                params = [sampling_params(rate)] * len(batch)
                start = time.perf_counter()
                outputs = engine.generate(input_ids=ids, sampling_params=params)
                seconds = (time.perf_counter() - start) / len(batch)
                cells += summarize(batch, outputs, rate, size, seconds)
    finally:
        engine.shutdown()
    return cells


def summarize(
    batch: list[Case], outputs: list[Any], rate: float, pool: int, seconds: float
) -> list[dict[str, Any]]:
    """One record per depth: keys found, and the worst prompt of the cell."""
    cells = []
    for depth in dict.fromkeys(case.depth for case in batch):
        pairs = [p for p in zip(batch, outputs, strict=True) if p[0].depth == depth]
        infos = [output["meta_info"]["kv_compress"] for _, output in pairs]
        wrong = [(c.key, o["text"]) for c, o in pairs if c.key not in o["text"]]
        cells.append(
            {
                "tokens": batch[0].length,
                "depth": depth,
                "rate": None if rate == FULL else rate,
                "asked": len(pairs),
                "found": len(pairs) - len(wrong),
                "prompt_tokens": [len(case.ids) for case, _ in pairs],
                "cached_tokens": [o["meta_info"]["cached_tokens"] for _, o in pairs],
                "pool": pool,
                "resident": max(info["resident_tokens"] for info in infos),
                "peak_resident": max(info["peak_resident_tokens"] for info in infos),
                "passes": min(info["passes"] for info in infos),
                "chunk_passes": min(info["chunk_passes"] for info in infos),
                "seconds_per_prompt": round(seconds, 3),
                "wrong": [{"key": k, "answer": text[:80]} for k, text in wrong],
            }
        )
    return cells


def check_chunked(cells: list[dict[str, Any]]) -> None:
    """Fail if a prompt beyond the pool was not compressed between its chunks."""
    for cell in cells:
        if max(cell["prompt_tokens"]) > cell["pool"] and not cell["chunk_passes"]:
            raise RuntimeError(f"longer than the pool, yet no chunk passes: {cell}")


def show(cells: list[dict[str, Any]]) -> None:
    """Print the table and the wrong answers."""
    columns = ("pool", "resident", "peak_resident", "passes", "chunk_passes")
    head = "".join(f"{name:>14}" for name in columns)
    print(f"{'prompt':>8}{'depth':>7}{'rate':>7}{'found':>8}{head}{'s/prompt':>10}")
    for cell in cells:
        rate = f"{cell['rate']:g}x" if cell["rate"] else "full"
        row = f"{max(cell['prompt_tokens']):>8}{cell['depth']:>7.0%}{rate:>7}"
        row += f"{cell['found']:>5}/{cell['asked']:<2}"
        row += "".join(f"{cell[name]:>14}" for name in columns)
        print(f"{row}{cell['seconds_per_prompt']:>10.2f}")
        for wrong in cell["wrong"]:
            print(f"         wrong: {wrong['key']} -> {wrong['answer']!r}")


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments, checked; lists are separated by commas or blanks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True)
    lists = {"lengths": [4096, 8192], "depths": [0.1, 0.5, 0.9], "rates": [1, 2, 4, 8]}
    for name, values in lists.items():
        parse = {"nargs": "+", "type": lambda word: json.loads(f"[{word}]")}
        add(f"--{name}", default=[values], **parse)
    add("--keys", "--samples", type=int, default=5, help="per cell")
    add("--pool", type=int, help="tokens of the KV pool")
    add("--chunks", choices=CHUNK_MODES, default="auto")
    queries = KVCompressOptions.chunk_queries
    add("--chunk-queries", choices=CHUNK_QUERIES, default=queries)
    add("--min-budget", type=int, default=KVCompressOptions.min_budget)
    add("--yarn", type=float, metavar="FACTOR", help="longer context")
    add("--full", action="store_true", help="ask the full cache, too")
    add("--filler", choices=("sentences", "essay"))
    add("--filler-file", "--text", type=Path, help="text of the essay")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("bench/results/passkey.jsonl"))
    args = parser.parse_args(words)
    for name in lists:
        setattr(args, name, sum(getattr(args, name), []))
    args.filler = args.filler or ("essay" if args.filler_file else "sentences")
    if (args.filler == "essay") != (args.filler_file is not None):
        parser.error("--filler essay and --filler-file PATH belong together")
    if not all(0 <= depth <= 1 for depth in args.depths) or min(args.rates) < 1:
        parser.error("--depths are fractions, 0 to 1, and --rates are at least 1")
    return args


def main() -> None:
    """Serve all cases, print the table and record it."""
    args = parse_arguments()
    serve.set_defaults(os.environ, serve.has_gpu(), Path(args.model).is_dir())
    from transformers import AutoTokenizer

    cases = make_cases(args, AutoTokenizer.from_pretrained(args.model))
    settings = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()}
    settings["model"] = Path(args.model).name
    for pool, rates in engine_plan(args):
        cells = ask(args, cases, pool, rates)
        show(cells)
        check_chunked(cells)
        write_record(args.out, {**environment(), **settings, "cells": cells})


if __name__ == "__main__":
    main()
