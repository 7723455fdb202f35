"""Every kernel against its reference and the bytes that it must move, on one GPU.

    python -m bench.kernels [--only decode,append,pass,report,prefill,host] [--quick]
    python -m bench.kernels --tune
    python -m bench.kernels --only decode --rows 3x6250,1x8192 [--layout tail]
    python -m bench.kernels --rows 3x6250,1x8192 --tune [--around num_stages=3]
    python -m bench.kernels --only decode --quick --shape 32x4x64x256
    python -m bench.kernels --only decode --kv-cache-dtype fp8_e4m3

Needs torch, triton and one Hopper GPU; with SGLang's FlashAttention-3 (FA3), decode and
prefill are compared with it. Without ``--shape`` it is that of Llama-3.1-8B; bf16. The
arena has 8 KV heads of 128 in mind: KV heads x head size should be 1,024. A kernel is
first compared with its reference and gets no number if it differs. Numbers are medians
of replayed CUDA graphs, L2 cold; "floor us" is the time to move the least bytes at
4.3 TB/s, what a copy reaches on an H200. Everything is appended to ``--out``.

``--rows`` names decode attention's rows, requests x KVs a head (s behind it: skewed),
in an arena as large as they need. ``--tune`` then changes one field after the other of
the shape's default configuration, or of what ``--around`` makes of it. The plot draws
every row in ``kernels.jsonl``: give such rows another ``--out``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.common.record import environment
from bench.kernels import (
    append,
    decode,
    decode_around,
    decode_case,
    decode_tune,
    host_copies,
    passes,
    prefill,
    reports,
)
from bench.kernels.batches import Shape, make_arena
from bench.kernels.timing import Clock, Report
from sglang_kvc.kernels.kv_dtype import E4M3

DTYPES = {"bf16": torch.bfloat16, "fp8_e4m3": E4M3}
SECTIONS = ("decode", "append", "pass", "report", "prefill", "host")
COPY_BYTES = 2 << 30
REPLAYS, QUICK_REPLAYS = 15, 7
SMALL_ARENA_PAGES = 4_352
"""More than 2**31 elements of K, as in a server."""
TUNE_SECONDS = 140.0


def import_fa3() -> Callable[..., Any] | None:
    """SGLang's FlashAttention-3, or None with a message."""
    try:
        from sglang.kernels.ops.attention.flash_attention import (
            flash_attn_with_kvcache,
        )

        # Its library is loaded at the first call only.
        q, k = (
            torch.randn(1, n, 1, 128, dtype=torch.bfloat16, device="cuda")
            for n in (1, 16)
        )
        zeros = torch.zeros(1, 1, dtype=torch.int32, device="cuda")
        flash_attn_with_kvcache(
            q, k, k, page_table=zeros, cache_seqlens=zeros[0] + 16, causal=True, ver=3
        )
    except Exception as error:
        print(f"no FA3: {type(error).__name__}: {str(error)[:200]}", flush=True)
        return None
    found: Callable[..., Any] = flash_attn_with_kvcache
    return found


def bench_copy(clock: Clock, report: Report) -> None:
    """Time what this GPU copies: the line that floors are drawn at."""
    with report.guard("copy"):
        source = torch.randn(COPY_BYTES // 4, device="cuda")
        target = torch.empty_like(source)
        # copy_ would be a memcpy node in a graph, which is slower than a kernel.
        timing = clock.gpu(lambda: torch.add(source, 1.0, out=target))
        report.add("copy", "copy", "2 GiB", timing, 2 * COPY_BYTES)


def arena_pages(
    sections: list[str], rows: Sequence[decode_case.Row] | None = None
) -> int:
    """Pages that the sections need, or given rows; 1 MiB of K and 1 MiB of V each."""
    if rows:
        return max(map(decode_case.row_pages, rows))
    needs = {
        "decode": decode_case.ARENA_PAGES,
        "pass": passes.ARENA_PAGES,
        "report": reports.ARENA_PAGES,
    }
    return max(needs.get(section, SMALL_ARENA_PAGES) for section in sections)


def parse_shape(text: str) -> Shape:
    """``32x8x32x128``: layers, KV heads, query heads, head size."""
    try:
        layers, kv_heads, qo_heads, head_dim = map(int, text.split("x"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 32x8x32x128") from error
    if qo_heads % kv_heads:
        raise argparse.ArgumentTypeError(f"{text}: KV heads do not divide query heads")
    return Shape(layers, kv_heads, qo_heads, head_dim)


def main() -> None:
    """Run the sections, each on its own; exit with 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--out", type=Path, default=Path("bench/results/kernels.jsonl"))
    parser.add_argument("--quick", action="store_true", help="few cases and replays")
    parser.add_argument(
        "--shape",
        type=parse_shape,
        default=Shape(),
        metavar="LAYERSxKVxQOxDIM",
        help="layers, KV heads, query heads, head size",
    )
    parser.add_argument(
        "--kv-cache-dtype",
        choices=DTYPES,
        default="bf16",
        help="decode only: K and V in e4m3, queries in bf16",
    )
    parser.add_argument("--tune", action="store_true", help="sweep decode instead")
    parser.add_argument("--tune-seconds", type=float, default=TUNE_SECONDS)
    parser.add_argument(
        "--rows",
        type=decode_case.parse_rows,
        metavar="RxN[s],...",
        help="decode only: requests x KVs a head, s: skewed",
    )
    parser.add_argument(
        "--layout",
        choices=decode_case.LAYOUTS,
        help="decode only, default: both; of --tune --rows: packed",
    )
    parser.add_argument(
        "--around",
        type=decode_around.parse_fields,
        metavar="FIELD=VALUE,...",
        help="of --tune --rows: what to replace in the shape's default",
    )
    args = parser.parse_args()
    sections = ["decode"] if args.tune else args.only.split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"--only knows {', '.join(SECTIONS)}, not {', '.join(unknown)}")
    dtype = DTYPES[args.kv_cache_dtype]
    if dtype == E4M3 and sections != ["decode"]:
        parser.error("--kv-cache-dtype fp8_e4m3 needs --only decode")
    if (args.rows or args.layout) and sections != ["decode"]:
        parser.error("--rows and --layout need --only decode")
    if args.layout == "tail" and any(row.skew for row in args.rows or ()):
        parser.error("--layout tail: its heads are equal")
    if args.tune and not args.rows and (args.layout or args.around):
        parser.error("--layout and --around of --tune need --rows")
    if args.around and not args.tune:
        parser.error("--around needs --tune")
    if not torch.cuda.is_available():
        parser.error("no GPU: nothing can be measured here")

    shape = args.shape
    pages = arena_pages(sections, args.rows)
    settings = {**vars(args), "out": args.out.name, "pages": pages}
    common = {**environment(), "args": settings, "shape": shape._asdict()}
    report = Report(args.out, common)
    clock = Clock("cuda", QUICK_REPLAYS if args.quick else REPLAYS)
    print(f"{common['gpu']}, commit {common['commit']}, {pages} pages", flush=True)
    bench_copy(clock, report)
    started = time.monotonic()
    torch.manual_seed(0)
    arena = make_arena(pages, shape, "cuda", dtype)
    base = (arena, shape, clock, report, args.quick)
    compared = {"decode", "prefill"} & set(sections) and (args.rows or not args.tune)
    fa3 = import_fa3() if compared else None
    work: dict[str, Callable[[], None]]
    if args.tune and args.rows:
        given = (*base[:-1], args.rows, args.tune_seconds, fa3)
        how = {"packed": args.layout != "tail", "fields": args.around}
        work = {"tune": lambda: decode_tune.tune_rows(*given, **how)}
    elif args.tune:
        work = {"tune": lambda: decode_tune.tune_decode(*base, args.tune_seconds)}
    else:
        which = {"rows": args.rows, "only": args.layout}
        every: dict[str, Callable[[], None]] = {
            "decode": lambda: decode.bench_decode(*base, fa3, **which),
            "append": lambda: append.bench_append(*base),
            "pass": lambda: passes.bench_pass(*base),
            "report": lambda: reports.bench_report(*base),
            "prefill": lambda: prefill.bench_prefill(*base, fa3),
            "host": lambda: host_copies.bench_host(*base),
        }
        work = {section: every[section] for section in sections}
    for name, run in work.items():
        begin = time.monotonic()
        with report.guard(name):
            run()
        print(f"== {name}: {time.monotonic() - begin:.0f} s", flush=True)
    report.print_table()
    print(f"{time.monotonic() - started:.0f} s in all", flush=True)
    raise SystemExit(1 if report.errors else 0)


if __name__ == "__main__":
    main()
