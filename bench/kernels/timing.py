"""Times on the GPU and on the host, and the record and table of a kernel bench."""

from __future__ import annotations

import contextlib
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.common.record import write_record

COPY_BYTES_PER_S = 4.3e12
"""What a plain copy reads and writes on one H200: the floor of everything here."""
FLUSH_BYTES = 256 << 20
WARM_SECONDS = 0.1
"""Of runs before those that are timed: behind heavy work the first dozen are slow."""
ERROR_CHARS = 300

Work = Callable[[], object]


class Timing(NamedTuple):
    """Median microseconds; `how` is "graph", or "eager" if it cannot be captured."""

    us: float
    how: str


class Clock:
    """Times work that starts with a cold L2 cache.

    Before every run 256 MB are *read*: a written buffer would leave dirty lines, whose
    write-back the measured kernel would pay. Runs are queued without waiting, so that
    the time between two events holds no launch of the host.
    """

    def __init__(self, device: str, replays: int = 15) -> None:
        self.replays = replays
        self._flush = torch.randn(FLUSH_BYTES // 4, device=device)

    def gpu(
        self, work: Work, before: Work | None = None, replays: int | None = None
    ) -> Timing:
        """Time `work` as a replayed CUDA graph.

        Parameters
        ----------
        work : launches on the current stream; run three times before it is timed.
        before : run before each of them, outside the time (restores what `work` wrote).
        replays : runs to take the median of.
        """
        before = before or _nothing
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                before()
                work()
        torch.cuda.current_stream().wait_stream(side)
        before()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                work()
        except RuntimeError as error:
            print(f"   not captured, timed eagerly: {_short(error)}", flush=True)
            return Timing(self._median(work, before, replays), "eager")
        return Timing(self._median(graph.replay, before, replays), "graph")

    def eager(self, work: Work, before: Work | None = None) -> Timing:
        """Time `work` uncaptured: the gaps that the host leaves are in the time."""
        return Timing(self._median(work, before or _nothing, None), "eager")

    def host(self, work: Work, before: Work | None = None) -> float:
        """Median microseconds that the host spends launching `work`."""
        times = []
        for _ in range(self.replays):
            (before or _nothing)()
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        return statistics.median(times) * 1e6

    def _median(self, work: Work, before: Work, replays: int | None) -> float:
        until = time.monotonic() + WARM_SECONDS
        while time.monotonic() < until:
            before()
            work()
            torch.cuda.synchronize()
        pairs = []
        # The first run is thrown away: a graph is uploaded at its first replay.
        for _ in range((replays or self.replays) + 1):
            before()
            self._flush.sum()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return statistics.median(b.elapsed_time(e) for b, e in pairs[1:]) * 1e3


def _nothing() -> None:
    """Do nothing."""


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:ERROR_CHARS]


class CheckError(AssertionError):
    """A kernel differs from its reference: it gets no number."""


def require_close(
    what: str, got: torch.Tensor, want: torch.Tensor, relative: float
) -> float:
    """Raise CheckError unless every last-dimension row of `got` is near `want`.

    Returns
    -------
    float : largest norm of a difference over the norm of its reference row.
    """
    got, want = got.float(), want.float()
    if not got.isfinite().all():
        raise CheckError(f"{what}: not finite")
    norm = want.norm(dim=-1).clamp_min(1e-30)
    error = float(((got - want).norm(dim=-1) / norm).max())
    if error > relative:
        raise CheckError(f"{what}: relative error {error:.1e}, allowed {relative:.0e}")
    return error


def require_equal(what: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """Raise CheckError unless both are bit-equal; NaN equals NaN."""
    if got.shape != want.shape or not torch.equal(
        got.nan_to_num(nan=7e4), want.nan_to_num(nan=7e4)
    ):
        raise CheckError(f"{what}: differs from the reference")


class Report:
    """Collects one record per number; prints them as a table."""

    def __init__(self, out: Path | None, common: dict[str, Any]) -> None:
        self.out, self.common = out, common
        self.rows: list[dict[str, Any]] = []
        self.errors: list[str] = []

    def add(
        self,
        section: str,
        kernel: str,
        case: str,
        timing: Timing,
        nbytes: float = 0.0,
        **fields: Any,
    ) -> None:
        """Record one checked number.

        Parameters
        ----------
        section, kernel, case : what was measured, on what.
        timing : of one call.
        nbytes : least bytes that one call must move; 0: no such floor.
        fields : further columns of the record.
        """
        row: dict[str, Any] = {
            "section": section,
            "kernel": kernel,
            "case": case,
            "us": round(timing.us, 2),
            "how": timing.how,
        }
        if nbytes:
            row["bytes"] = int(nbytes)
            row["tb_s"] = round(nbytes / timing.us / 1e6, 3)
            row["floor_us"] = round(nbytes / COPY_BYTES_PER_S * 1e6, 2)
        row |= {**fields, "check": "ok"}
        self.rows.append(row)
        print(_line(row), flush=True)
        if self.out is not None:
            write_record(self.out, {**self.common, **row})

    @contextlib.contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Print an error of the block and go on after it."""
        try:
            yield
        except Exception as error:
            self.errors.append(f"{what}: {type(error).__name__}: {_short(error)}")
            print(f"!! {self.errors[-1]}", flush=True)
            if not isinstance(error, CheckError):
                print("".join(traceback.format_exc().splitlines(True)[-7:]), flush=True)

    def print_table(self) -> None:
        """All numbers again, together, and the errors."""
        head = ("section", "kernel", "case", "us", "floor us", "TB/s")
        print(f"\n{head[0]:8} {head[1]:20} {head[2]:26}{head[3]:>10}", end="")
        print(f"{head[4]:>10}{head[5]:>7}  notes")
        for row in self.rows:
            print(_line(row))
        for error in self.errors:
            print(f"!! {error}")
        print(f"{len(self.rows)} numbers, {len(self.errors)} errors", flush=True)


SHOWN = (
    "host_us",
    "link_gb_s",
    "layout",
    "tflops",
    "one_way_tb_s",
    "gpu_eager_us",
    "config",
)


def _line(row: dict[str, Any]) -> str:
    """One row of the table."""
    floor = f"{row['floor_us']:10.1f}{row['tb_s']:7.2f}" if "tb_s" in row else " " * 17
    notes = [f"{key} {row[key]}" for key in SHOWN if key in row]
    notes += ["eager"] if row["how"] == "eager" else []
    line = f"{row['section']:8} {row['kernel']:20} {row['case']:26}{row['us']:10.1f}"
    return line + floor + "  " + ", ".join(notes)
