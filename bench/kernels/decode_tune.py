"""Sweep the decode kernel's configurations over the rows of `decode_case`, or others.

`tune_decode`: first every (tile, warps, stages) with the default work split; then the
work splits of the best, fewer of the second best; last a limit on the registers. At
most 37 configurations; most of the time goes into compiling them. `tune_rows`: given
rows, one change at a time around the shape's default (`decode_around`); a step that
stores its tokens beside attention alone, and FlashAttention-3 as stock SGLang runs it.
A configuration that computes a row wrongly, or does not fit the GPU, is dropped.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from bench.kernels.batches import Shape
from bench.kernels.decode import bench_stock
from bench.kernels.decode_around import Fields, configs_around
from bench.kernels.decode_case import (
    QUICK_ROWS,
    ROWS,
    Decode,
    Row,
    make_workspace,
    row_batch,
)
from bench.kernels.decode_steps import new_tokens
from bench.kernels.timing import CheckError, Clock, Report, Timing
from sglang_kvc.kernels import decode_attention as decode
from sglang_kvc.kernels.layout import Arena

REPLAYS = 7
# Stages go to pages and to K and V in turn: 3, 5 and 7 load one, two and three tiles
# ahead (`DecodeConfig`).
TILES, WARPS, STAGES = (64, 128), (4, 8), (3, 4, 5, 7)
PROGRAMS, SHARES = (2, 3, 4, 8, 16), (1, 2, 4)
REGISTERS = (96, 128, 168)
SHOWN = 3

Times = dict[Any, dict[str, Timing]]


class Timed(NamedTuple):
    """What a configuration is timed on; `new` are the newest tokens of a row of which
    steps are timed, too.
    """

    row: str
    case: Decode
    kernel: str = "decode_attention"
    new: decode.NewTokens | None = None


def tune_decode(
    arena: Arena, shape: Shape, clock: Clock, report: Report, quick: bool, limit: float
) -> None:
    """Time the configurations, print the best; stops after `limit` seconds."""
    deadline = time.monotonic() + limit
    device, pages = arena.k.device, arena.k.shape[0]
    cases = {
        row.name: Timed(row.name, Decode(arena, shape, batch))
        for row in (QUICK_ROWS if quick else ROWS)
        for batch in [row_batch(row, shape, pages, str(device))]
    }
    times: Times = {}
    default = decode.DecodeConfig()
    print(f"{decode.DecodeConfig._fields}: us of {', '.join(cases)}", flush=True)
    for tile, warps, stages in itertools.product(TILES, WARPS, STAGES):
        config = default._replace(tile=tile, num_warps=warps, num_stages=stages)
        _time_config(config, cases, clock, times, report, deadline)
    finalists = [config for config, _ in ranking(times)[:2]]
    further = [
        best._replace(programs_per_sm=programs, min_share=share)
        for best, shares in zip(finalists, (SHARES, SHARES[:1]), strict=False)
        for programs, share in itertools.product(PROGRAMS, shares)
    ]
    for config in further:
        if config not in times:
            _time_config(config, cases, clock, times, report, deadline)
    for best, _ in ranking(times)[:1]:
        for registers in REGISTERS:
            config = best._replace(max_registers=registers)
            _time_config(config, cases, clock, times, report, deadline)
    _print_best(cases, times, report)


def tune_rows(
    arena: Arena,
    shape: Shape,
    clock: Clock,
    report: Report,
    rows: Sequence[Row],
    limit: float,
    fa3: Any,
    *,
    packed: bool = True,
    fields: Fields | None = None,
) -> None:
    """Time the shape's default, with `fields` replaced, and its neighbours on `rows`.

    Parameters
    ----------
    limit : seconds after which no further configuration is begun.
    packed : whether rows have packed blocks and a tail, or token pages only.
    """
    device, pages = arena.k.device, arena.k.shape[0]
    cases: dict[str, Timed] = {}
    for row in rows:
        batch = row_batch(row, shape, pages, str(device), packed)
        case = Decode(arena, shape, batch)
        if fa3 is not None:
            with report.guard(f"fa3_stock_page1 {row.name}"):
                bench_stock(case, row, 1, clock, report, fa3)
        new = new_tokens(case)
        cases[row.name] = Timed(row.name, case, new=new)
        cases[f"{row.name} step"] = Timed(row.name, case, "decode_step", new)
    deadline = time.monotonic() + limit
    times: Times = {}
    print(f"{decode.DecodeConfig._fields}: us of {', '.join(cases)}", flush=True)
    for config in configs_around(shape, fields, byte_cells=arena.k.element_size() == 1):
        _time_config(config, cases, clock, times, report, deadline)
    _print_best(cases, times, report)


def _time_config(
    config: Any,
    cases: dict[str, Timed],
    clock: Clock,
    times: Times,
    report: Report,
    deadline: float,
) -> None:
    """Time every row under one configuration; a row that fails has no time."""
    if time.monotonic() > deadline:
        print(f"   out of time: {tuple(config)} is left out", flush=True)
        return
    begin = time.monotonic()
    found: dict[str, Timing] = {}
    for name, timed in cases.items():
        try:
            found[name] = _time_row(config, timed, clock)
        except Exception as error:
            what = f"tune {tuple(config)} {name}: {type(error).__name__}: "
            what += str(error)[:200]
            print(f"!! {what}", flush=True)
            # Too much shared memory is no mistake, a wrong result is.
            if isinstance(error, CheckError):
                report.errors.append(what)
            break
    times[config] = found
    cells = " ".join(f"{timing.us:8.1f}" for timing in found.values())
    print(f"{tuple(config)!s:20} {cells}  {time.monotonic() - begin:.1f} s", flush=True)


def _time_row(config: Any, timed: Timed, clock: Clock) -> Timing:
    """Plan, check and time one row."""
    case, new = timed.case, timed.new
    if new is not None:
        # Rows may share pages, so steps of others may have stored in these.
        case.store(new)
    given = {"new_tokens": new} if timed.kernel == "decode_step" else {}
    how = {"config": config, "query_ring": None if new is None else new.query_ring}
    shape, batch = case.shape, case.batch
    workspace = make_workspace(shape, case.q.device, config=config)
    lengths = (batch.tables, batch.slots, batch.seq_lens)
    decode.plan_decode_triton(*lengths, workspace, num_kv_heads=shape.kv_heads, **how)

    def run(layer: int) -> torch.Tensor:
        return decode.decode_attention_triton(
            **case.arguments(layer),
            **given,
            out=case.out,
            workspace=workspace,
            config=config,
        )

    case.check(run)
    return case.time(clock, run, REPLAYS)


def ranking(times: Times) -> list[tuple[Any, float]]:
    """Configurations that ran every row, by geometric mean of time over the best."""
    rows = {name for found in times.values() for name in found}
    best = {
        name: min(found[name].us for found in times.values() if name in found)
        for name in rows
    }
    means = [
        (
            config,
            statistics.geometric_mean(found[name].us / best[name] for name in rows),
        )
        for config, found in times.items()
        if found.keys() == rows and rows
    ]
    return sorted(means, key=lambda item: item[1])


def _print_best(cases: dict[str, Timed], times: Times, report: Report) -> None:
    """Best three of each row, the first, and the best of all rows.

    Those of each row go to the records too.
    """
    fields = ", ".join(decode.DecodeConfig._fields)
    print(f"\nbest configurations ({fields})")
    for name, (row, case, kernel, _) in cases.items():
        ran = [config for config, found in times.items() if name in found]
        best = sorted(ran, key=lambda config: times[config][name].us)[:SHOWN]
        for config in dict.fromkeys([*best, *ran[:1]]):
            about = {"config": list(config)}
            timing = times[config][name]
            report.add("tune", kernel, row, timing, case.bytes, **about)
    print("over all rows: time / best of the row, geometric mean")
    for config, mean in ranking(times)[: 2 * SHOWN]:
        print(f"   {tuple(config)!s:22} {mean:.3f}", flush=True)
