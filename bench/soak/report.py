"""Counts, percentiles and the table of a soak."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from bench.common.client import LEFT, Outcome
from bench.common.percentiles import percentile

MAX_FAILURES = 200
SHOWN_FAILURES = 20
REPORT_SUMS = ("passes", "chunk_passes", "deferred_passes")
SINGLE = (
    "sent seconds tokens_in tokens_cached tokens_out canaries aborts_sent retractions "
    "passes chunk_passes deferred_passes compressed logical resident retracted_by_log "
    "tracebacks_in_log pool used_when_idle used_after_flush flushed alive"
)
"""Figures of a soak that have a line each."""


def growth_per_thousand(
    samples: Sequence[tuple[int, float]], skip: int
) -> float | None:
    """Growth of memory per 1,000 requests, in percent of what it was after `skip`.

    The slope of a line through all samples from `skip` requests on, so that one sample
    under more load than another does not decide.

    Parameters
    ----------
    samples : sequence of (int, float)
        Requests done, and memory.
    skip : int
        Samples before so many requests are left out: caches fill, pools warm up.
    """
    late = [(done, value) for done, value in samples if done >= skip]
    if len({done for done, _ in late}) < 2 or not late[0][1]:
        return None
    mean_x = sum(x for x, _ in late) / len(late)
    mean_y = sum(y for _, y in late) / len(late)
    spread = sum((x - mean_x) ** 2 for x, _ in late)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in late) / spread
    return 100 * 1000 * slope / late[0][1]


def settled_after(requests: int) -> int:
    """Requests after which memory should be flat: 1,000, or a third of a short soak."""
    return min(1000, requests // 3)


class Latencies:
    """First tokens and gaps of streams, in seconds."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.gaps: list[float] = []

    def add(self, outcome: Outcome) -> None:
        """Take the latencies of one stream."""
        if outcome.answer.first is not None:
            self.first.append(outcome.answer.first)
            self.gaps += outcome.answer.gaps

    def summary(self) -> dict[str, Any]:
        """Median, p99 and worst, in milliseconds."""
        values: dict[str, Any] = {"streams": len(self.first)}
        for name, seconds in (("first", self.first), ("gap", self.gaps)):
            for label, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
                found = percentile(seconds, share)
                values[f"{name}_{label}_ms"] = found and round(1000 * found, 2)
        return values


class Tally:
    """Everything that is counted while the soak runs."""

    def __init__(self) -> None:
        self.results: Counter[str] = Counter()
        self.kinds: dict[str, Counter[str]] = {}
        self.refused: Counter[str] = Counter()
        self.sums: Counter[str] = Counter()
        self.failures: list[dict[str, Any]] = []
        self.failed = 0
        self.latencies = {
            name: Latencies()
            for name in ("canary, quiet", "canary, loaded", "canary, after", "streams")
        }

    @property
    def done(self) -> int:
        """Requests that have ended, without canaries."""
        return self.results.total()

    def add(self, outcome: Outcome) -> None:
        """Count a request of the load."""
        job, answer = outcome.job, outcome.answer
        self.results[outcome.result] += 1
        kind = job.kind.split(":")[0]
        self.kinds.setdefault(kind, Counter())[outcome.result] += 1
        if outcome.result == "refused":
            self.refused[f"{answer.status} {job.kind.removeprefix('hostile: ')}"] += 1
        if job.stream and not job.act:
            self.latencies["streams"].add(outcome)
        self._add_common(outcome)

    def add_canary(self, outcome: Outcome, phase: str) -> None:
        """Count a small request; `phase` is quiet, loaded or after."""
        self.sums["canaries"] += 1
        self.latencies[f"canary, {phase}"].add(outcome)
        self._add_common(outcome)

    def _add_common(self, outcome: Outcome) -> None:
        answer = outcome.answer
        self.sums["tokens_in"] += answer.tokens("prompt_tokens")
        self.sums["tokens_out"] += answer.tokens("completion_tokens")
        self.sums["tokens_cached"] += answer.tokens("cached_tokens")
        self.sums["retractions"] += answer.tokens("num_retractions")
        for info in answer.infos.values():
            report = info.get("kv_compress") or {}
            for name in REPORT_SUMS:
                self.sums[name] += report.get(name) or 0
            if report.get("enabled") and outcome.result != LEFT:
                self.sums["compressed"] += 1
                self.sums["logical"] += report.get("logical_tokens") or 0
                self.sums["resident"] += report.get("resident_tokens") or 0
        if outcome.failed:
            self.fail(outcome.job.kind, outcome.detail, outcome.job.rid)

    def fail(self, kind: str, detail: str, rid: str = "", first: bool = False) -> None:
        """Note something that must not happen; `first` if the rest follows from it."""
        self.failed += 1
        for one in self.failures:
            if (one["kind"], _digitless(one["detail"])) == (kind, _digitless(detail)):
                one["times"] += 1
                return
        if first or len(self.failures) < MAX_FAILURES:
            new = {"kind": kind, "detail": detail, "rid": rid, "times": 1}
            self.failures.insert(0 if first else len(self.failures), new)

    def record(self) -> dict[str, Any]:
        """All of it, for a JSON line."""
        return {
            "requests": self.done,
            "results": dict(self.results),
            "kinds": {kind: dict(counts) for kind, counts in self.kinds.items()},
            "refused": dict(sorted(self.refused.items())),
            **self.sums,
            "latencies": {k: v.summary() for k, v in self.latencies.items()},
            "failed": self.failed,
            "failures": self.failures[:SHOWN_FAILURES],
        }


def _digitless(text: str) -> str:
    """Text of a failure without digits: those that differ in numbers only are one."""
    return re.sub("[0-9]+", "#", text)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.2f}"
    if isinstance(value, int):
        return f"{value:,}"
    return "" if value is None else str(value)


def grid(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table: the first column to the left, the others to the right."""
    lines = [list(head), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            word.ljust(width) if i == 0 else word.rjust(width)
            for i, (word, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def format_soak(values: dict[str, Any]) -> str:
    """The table of a soak's record."""
    results = values["results"]
    names = sorted(results, key=lambda name: -results[name])
    parts = [
        grid(
            ["requests", *names, "all"],
            [
                [kind, *(counts.get(name, 0) for name in names), sum(counts.values())]
                for kind, counts in sorted(values["kinds"].items())
            ]
            + [["all", *(results[name] for name in names), values["requests"]]],
        )
    ]
    if values["refused"]:
        parts.append(grid(["refused", "times"], list(values["refused"].items())))
    parts.append(
        grid(
            ["latency, ms", "streams"]
            + [f"{n} {p}" for n in ("first", "gap") for p in ("p50", "p99", "max")],
            [[name, *row.values()] for name, row in values["latencies"].items()],
        )
    )
    if values.get("memory"):
        parts.append(
            grid(
                ["memory, MiB", "start", "settled", "end", "% per 1,000"],
                [
                    [name, m["start"], m["settled"], m["end"], m["growth"]]
                    for name, m in values["memory"].items()
                ],
            )
        )
    rows = [[name.replace("_", " "), values.get(name)] for name in SINGLE.split()]
    parts.append(
        grid(["", ""], [row for row in rows if row[1] is not None]).strip("\n")
    )
    if values.get("left_out"):
        parts.append("left out: " + ", ".join(values["left_out"]))
    return "\n\n".join([*parts, format_failures(values)])


def format_failures(values: dict[str, Any]) -> str:
    """What must not happen and did, or that nothing did."""
    if not values["failed"]:
        return "nothing unexpected"
    lines = [f"{values['failed']} UNEXPECTED:"]
    for one in values["failures"]:
        first = f" (first: {one['rid']})" if one["rid"] else ""
        lines.append(f"  {one['times']} x {one['kind']}: {one['detail']}{first}")
    return "\n".join(lines)
