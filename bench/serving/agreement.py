"""How many greedy answers several ways of serving one model have in common.

    python -m bench.serving.agreement --model PATH --text essays.txt --rate 1 \\
        --way 'stock: {"stock": true}' --way 'ours: {}' \\
        --way 'two: {"tp_size": 2}' --out bench/results/agreement.jsonl

A way is a name and JSON keywords of ``sglang.Engine``; ``"stock": true`` leaves the
plugin out. ``"nnodes": 2`` starts as many engines here, one a node, each on GPUs of its
own: the first node sees the first ``tp_size / nnodes`` of them. The first way is what
the others are compared with. Prompts are passages of the text, one request each, all
sent at once. Answers of two kernels may part at a near tie and then differ to the end,
so the place of the first difference is shown, too. ``--logs`` keeps the engines' logs.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from bench.common.ports import free_ports
from bench.common.record import ROOT, environment, write_record
from bench.serving.child import Child, start_engine
from bench.serving.engine import sampling_params
from bench.serving.session import IDLE_SECONDS, START_LIMIT

ANSWER_LIMIT = 300.0
END_SECONDS = 15.0
"""The engine of a further node waits for the first one, which is gone."""


def parse_way(text: str) -> tuple[str, dict[str, Any]]:
    """Name and keywords of ``name: {...}``."""
    name, found, keywords = text.partition(":")
    if not found:
        raise argparse.ArgumentTypeError(f"a way is 'name: {{...}}', got {text!r}")
    try:
        values = json.loads(keywords)
    except json.JSONDecodeError as problem:
        raise argparse.ArgumentTypeError(f"{name}: not JSON: {problem}") from problem
    return name.strip(), values


def passages(
    model: str, text: Path, lengths: tuple[int, int], count: int
) -> list[list[int]]:
    """Token ids of `count` passages, spread over the text."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(text.read_text())["input_ids"]
    rng = random.Random(0)
    found = []
    for number in range(count):
        length = rng.randint(*lengths)
        start = (len(ids) - length) * number // max(count - 1, 1)
        found.append(ids[start : start + length])
    return found


def start(args: argparse.Namespace, way: dict[str, Any], log: Path) -> list[Child]:
    """An engine in a process of its own, or one for each node; the first answers."""
    stock = way.get("stock", False)
    keywords = {
        "model_path": args.model,
        "load_format": args.load_format,
        "skip_tokenizer_init": True,
        "skip_server_warmup": True,
        "log_level": "info",
        "random_seed": 0,
        "max_total_tokens": args.pool,
        **json.loads(args.extra_args),
        **({} if stock else {"kv_compress": True}),
        **{name: value for name, value in way.items() if name != "stock"},
    }
    nodes, port = way.get("nnodes", 1), free_ports(1)[0]
    if nodes == 1:
        return [start_engine(keywords, log, port=port, stock=stock)]
    keywords["dist_init_addr"] = f"127.0.0.1:{free_ports(1)[0]}"
    gpus = way.get("tp_size", nodes) // nodes
    return [
        start_engine(
            {**keywords, "node_rank": node},
            log.with_suffix(f".node{node}.log"),
            port=port,
            stock=stock,
            gpus=range(node * gpus, (node + 1) * gpus),
        )
        for node in range(nodes)
    ]


def agreement(first: list[list[int]], other: list[list[int]]) -> dict[str, Any]:
    """Answers that are equal, and the tokens before the first difference."""
    pairs = list(zip(first, other, strict=True))
    alike = [
        len(list(takewhile(lambda two: two[0] == two[1], zip(*pair, strict=False))))
        for pair in pairs
    ]
    return {
        "equal": sum(one == two for one, two in pairs),
        "alike_tokens": alike,
        "tokens": [len(one) for one, _ in pairs],
    }


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--way", type=parse_way, action="append", required=True)
    parser.add_argument("--rate", type=float, default=1, help="of ours")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--lengths", type=int, nargs=2, default=(100, 1900))
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--pool", type=int, default=65536, help="tokens")
    parser.add_argument("--extra-args", default="{}", help="JSON, of every way")
    parser.add_argument(
        "--apart", action="store_true", help="one engine after the other"
    )
    parser.add_argument(
        "--start-limit",
        type=float,
        default=START_LIMIT,
        help="seconds; more for engines that compile kernels at start",
    )
    parser.add_argument("--logs", type=Path, help="folder that keeps SGLang's logs")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench/results/agreement.jsonl"
    )
    return parser.parse_args(words)


def log_name(number: int, name: str) -> str:
    """File of a way's log, whatever its name is."""
    return f"{number}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}.log"


def answer_all(
    args: argparse.Namespace, prompts: list[list[int]], logs: Path
) -> dict[str, list[list[int]]]:
    """Start the engines, tell when each is ready, and ask them; answers by way."""
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {text}", flush=True)

    def begin(number: int) -> list[Child]:
        name, way = args.way[number]
        say(f"starting {name}")
        return start(args, way, logs / log_name(number, name))

    answers: dict[str, list[list[int]]] = {}
    children = [] if args.apart else [begin(n) for n in range(len(args.way))]
    for number, (name, way) in enumerate(args.way):
        engine = begin(number) if args.apart else children[number]
        child = engine[0]
        try:
            ready = child.wait(args.start_limit)
            say(f"{name} ready in {ready['ready_s']:.0f} s")
            rate = None if way.get("stock") else args.rate
            params = sampling_params({"output_len": args.output, "rate": rate})
            command = {"op": "answers", "prompts": prompts, "params": params}
            answers[name] = child.ask(command, ANSWER_LIMIT)["ids"]
            say(f"{name} answered {len(prompts)} prompts")
            # SGLang ends a server whose idle check finds a lost page.
            time.sleep(IDLE_SECONDS)
            child.ask({"op": "flush"}, ANSWER_LIMIT)
            child.ask({"op": "alive"}, ANSWER_LIMIT)
        finally:
            for one in engine:
                one.close(END_SECONDS)
    return answers


def main(words: Sequence[str] | None = None) -> None:
    """Ask every way, compare, record."""
    args = parse_arguments(words)
    prompts = passages(args.model, args.text, tuple(args.lengths), args.prompts)
    with tempfile.TemporaryDirectory() as folder:
        logs = args.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        answers = answer_all(args, prompts, logs)
    (first, _), *others = args.way
    for name, way in others:
        result = agreement(answers[first], answers[name])
        record = {
            **environment(),
            "model": Path(args.model).name,
            "load_format": args.load_format,
            "rate": args.rate,
            "first": dict(args.way)[first],
            "other": way,
            "extra": json.loads(args.extra_args),
            **result,
        }
        write_record(args.out, record)
        print(
            f"{name}: {result['equal']} of {len(prompts)} answers equal those of "
            f"{first}; {sum(result['alike_tokens'])} of {sum(result['tokens'])} tokens "
            "before the first difference"
        )


if __name__ == "__main__":
    main()
