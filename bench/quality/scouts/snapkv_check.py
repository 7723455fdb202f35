"""Our uniform squared attention keeps what kvpress keeps with the same metric.

    pip install --no-deps --target KVPRESS_DIR ...  (REQUIREMENTS of kvpress_systems)
    python -m bench.quality.scouts.snapkv_check --model DIR \\
        --kvpress KVPRESS_DIR --out FILE

One side is the served engine (the scheduler of ``tests/engine``, its passes followed
by ``tests/engine/tracer.py``) with ``allocation=head``, ``metric=l2``, no sinks and
``protected`` = ``window``; the other is `snapkv_press`, which says what stock SnapKV
does differently. Prompts and budgets are whole pages, so page rounding plays no part.
Both sides compute in fp32.

Maximum pooling makes plateaus, and a cut that goes through one has no right answer:
`torch.topk` picks some of the equal scores, we drop the oldest first. So the sets are
compared twice, with kvpress' own top-k and with its scores cut by our rule for ties;
what is left then is listed with its distance from the cut. Exit status 1 if any
difference is no near-tie.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.common.record import ROOT, environment, write_record

TIE = 1e-4
"""Relative; fp32 sums in another order agree to about 1e-5."""
STRIDE = 768
"""Tokens between the beginnings of two prompts."""
LISTED = 50
"""Most near-ties that are written out."""


@dataclass
class Comparison:
    """Kept sets of both sides, over all prompts, layers and heads.

    Attributes
    ----------
    kept : int
        KVs that each side keeps.
    differ_topk, differ : int
        KVs of ours that kvpress does not keep: by its own top-k, and after its scores
        are cut by our rule for ties.
    differ_stock : int
        Those that SnapKV as shipped does not keep.
    equal_heads, heads : int
        Heads with equal sets under one rule for ties, and all.
    near_ties : list of dict
        The differences that are left, one by one.
    unexplained : int
        Of all differences, those further than `TIE` from the cut.
    exact_ties : int
        Of the differences from kvpress' own top-k, on either side, those that score
        exactly as much as the cut.
    """

    kept: int = 0
    differ_topk: int = 0
    differ: int = 0
    differ_stock: int = 0
    equal_heads: int = 0
    heads: int = 0
    near_ties: list[dict[str, Any]] = field(default_factory=list)
    unexplained: int = 0
    exact_ties: int = 0


def cut(scores: Any, budget: int) -> set[int]:
    """Positions of the best scores; of equal ones the oldest go first."""
    order = np.lexsort((np.arange(len(scores)), scores))
    return {int(place) for place in order[len(scores) - budget :]}


def compare_head(
    total: Comparison, where: dict[str, int], own: set[int], kept: set[int], scores: Any
) -> None:
    """Add a head to the comparison.

    Parameters
    ----------
    total : Comparison
    where : dict
        Names the head in the list of near-ties.
    own, kept : set of int
        Positions that our engine and kvpress keep.
    scores : [tokens]
        Kvpress' side's.
    """
    theirs = cut(scores, len(kept))
    edge = min(float(scores[place]) for place in theirs)
    total.heads += 1
    total.kept += len(own)
    total.differ_topk += len(own - kept)
    total.differ += len(own - theirs)
    total.equal_heads += own == theirs
    for place in sorted(own ^ theirs | own ^ kept):
        gap = abs(float(scores[place]) - edge) / max(edge, 1e-30)
        total.unexplained += not gap <= TIE
        total.exact_ties += gap == 0 and place in own ^ kept
        if place in own ^ theirs and len(total.near_ties) < LISTED:
            side = "ours" if place in own else "kvpress"
            total.near_ties.append(
                {**where, "position": place, "kept_by": side, "gap": gap}
            )


def compare(ours: Sequence[Any], theirs: dict[str, Any], kv_heads: int) -> Comparison:
    """Compare all prompts.

    Parameters
    ----------
    ours : per prompt, per head: kept positions.
    theirs : arrays of `snapkv_press`.
    kv_heads : int
        Of a layer.
    """
    total = Comparison()
    for prompt, heads in enumerate(ours):
        for number, positions in enumerate(heads):
            layer, head = divmod(number, kv_heads)
            own = set(positions)
            compare_head(
                total,
                {"prompt": prompt, "layer": layer, "head": head},
                own,
                set(theirs["ours_kept"][prompt][number].tolist()),
                theirs["ours_scores"][prompt][number],
            )
            stock = set(theirs["snapkv_kept"][prompt][number].tolist())
            total.differ_stock += len(own - stock)
    return total


def ask_kvpress(
    args: argparse.Namespace, prompts: list[list[int]], folder: Path
) -> dict[str, Any]:
    """Run `snapkv_press` in its environment; the arrays that it wrote."""
    source, target = folder / "prompts.json", folder / "kept.npz"
    source.write_text(json.dumps(prompts))
    words = ["--model", args.model, "--prompts", str(source), "--out", str(target)]
    for name in ("window", "pool", "budget"):
        words += [f"--{name}", str(getattr(args, name))]
    subprocess.run(
        [sys.executable, "-m", "bench.quality.scouts.snapkv_press", *words],
        env={**os.environ, "PYTHONPATH": f"{args.kvpress.resolve()}"},
        cwd=ROOT,
        check=True,
    )
    with np.load(target) as arrays:
        return dict(arrays)


def ask_engine(
    args: argparse.Namespace, prompts: list[list[int]]
) -> tuple[list[list[list[int]]], int]:
    """Serve the prompts; positions kept by every head, and the KV heads of a layer."""
    from tests.engine.inprocess import InProcessScheduler, Request, make_server_args
    from tests.engine.tracer import PassTracer

    options = {
        "allocation": "head",
        "metric": "l2",
        "sinks": 0,
        "window": args.window,
        "protected": args.window,
        "pool_back": args.pool // 2,
        "pool_ahead": args.pool // 2,
        "pool_decay": 1.0,
        "pool_gain": 1.0,
        "distinct": 0.0,
        "min_budget": args.budget,
        "chunks": "never",
    }
    server_args = make_server_args(
        args.model,
        compress=True,
        chunked_prefill_size=args.length,
        **{f"kv_compress_{key}": value for key, value in options.items()},
    )
    scheduler = InProcessScheduler(server_args)
    runtime = scheduler.allocator.get_kvcache().runtime
    found = []
    for number, ids in enumerate(prompts):
        with PassTracer(runtime) as tracer:
            scheduler.serve(
                [Request(str(number), ids, max_new=2, kv={"budget": args.budget})]
            )
        ((passes,), (lengths,)) = tracer.kept.values(), tracer.lengths.values()
        if lengths != [len(ids)]:
            raise RuntimeError(f"passes at {lengths}, expected one at {len(ids)}")
        found.append(passes[0])
    return found, runtime.state.shape.num_kv_heads


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m bench.quality.scouts.snapkv_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--model", required=True, help="folder of a Hugging Face model")
    add("--kvpress", type=Path, required=True, help="folder with kvpress in it")
    add("--prompts", type=int, default=4)
    add("--length", type=int, default=512, help="of each prompt, whole pages")
    add("--budget", type=int, default=128, help="KVs kept of a head, whole pages")
    add("--window", type=int, default=32)
    add("--pool", type=int, default=7)
    add("--out", type=Path, help="append the result to this JSONL file")
    return made


def main(words: Sequence[str] | None = None) -> int:
    """Compare; the exit status is 1 if a difference is no near-tie."""
    from sglang_kvc.config.pages import PAGE_SIZE
    from tests.engine.texts import prompt

    args = parser().parse_args(words)
    if args.length % PAGE_SIZE or args.budget % PAGE_SIZE:
        raise SystemExit(f"--length and --budget must be multiples of {PAGE_SIZE}")
    if not args.window < args.budget < args.length:
        raise SystemExit("--budget must lie between --window and --length")
    prompts = [
        prompt(args.model, number * STRIDE, args.length)
        for number in range(args.prompts)
    ]
    with tempfile.TemporaryDirectory() as folder:
        theirs = ask_kvpress(args, prompts, Path(folder))
    ours, kv_heads = ask_engine(args, prompts)
    result = compare(ours, theirs, kv_heads)
    line = {
        "check": "snapkv",
        "model": Path(args.model).name,
        **{
            name: getattr(args, name)
            for name in ("prompts", "length", "budget", "window", "pool")
        },
        "against": theirs["versions"].tolist(),
        "attention_apart": float(theirs["ours_apart"].max()),
        "tie": TIE,
        **asdict(result),
    }
    if args.out:
        write_record(args.out, {**environment(), **line})
    print(json.dumps(line))
    return int(result.unexplained > 0)


if __name__ == "__main__":
    raise SystemExit(main())
