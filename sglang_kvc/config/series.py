"""What ``/metrics`` shows of KV-Compress: names, labels and meanings.

The guide's table is made of it. Imports neither torch nor SGLang.
"""

from __future__ import annotations

from dataclasses import dataclass

PREFIX = "sglang:kv_compress_"


@dataclass(frozen=True)
class Series:
    """A gauge or a counter.

    Parameters
    ----------
    name : str
        As Prometheus shows it; that of a counter ends with ``_total``.
    text : str
        What it counts.
    label : str
        A label beside those that SGLang gives all series of a process; empty: none.
    values : tuple of str
        All values that the label takes. Nothing that a client sends is one.
    """

    name: str
    text: str
    label: str = ""
    values: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Type of the series, in Prometheus' words."""
        return "counter" if self.name.endswith("_total") else "gauge"


LOGICAL = Series(
    f"{PREFIX}logical_tokens", "Tokens of running requests, prompts and answers."
)
RESIDENT = Series(
    f"{PREFIX}resident_tokens",
    "Tokens of memory that running requests hold, per KV head on average.",
)
RATIO = Series(
    f"{PREFIX}ratio",
    "Logical tokens of running requests by resident ones; NaN while none runs.",
)
TAIL = Series(
    f"{PREFIX}tail_tokens",
    "Tokens of running requests in token pages behind the fold: all of them until a "
    "request's first pass.",
)
PASSES = Series(
    f"{PREFIX}passes_total",
    "Passes, by what they come behind: a whole prompt, a chunk of one, or decoded "
    "tokens.",
    "kind",
    ("prompt", "chunk", "decode"),
)
DEFERRED = Series(
    f"{PREFIX}deferred_passes_total",
    "Times that a pass found no free pages. It is tried again at the next step.",
)
SECONDS = Series(
    f"{PREFIX}pass_seconds_total",
    "Time that passes and their probes took: on a GPU that of the device, on a CPU "
    "that of the scheduler.",
)
MOVED = Series(
    f"{PREFIX}moved_pages_total", "Fresh pages that passes have copied survivors to."
)

SNAPSHOTS = Series(
    f"{PREFIX}snapshots",
    "Snapshots of ended requests that are in the pool, with --kv-compress-sessions.",
)
SNAPSHOT_TOKENS = Series(
    f"{PREFIX}snapshot_tokens", "Tokens of memory that their packed pages take."
)
HITS = Series(
    f"{PREFIX}snapshot_hits_total", "Requests that have started from a snapshot."
)
EVICTIONS = Series(
    f"{PREFIX}snapshot_evictions_total",
    "Snapshots given up to make room; not those that a later turn has replaced.",
)
IN_HOST = Series(
    f"{PREFIX}host_snapshots",
    "Snapshots in host memory, with --kv-compress-sessions-host.",
)
BROUGHT_BACK = Series(
    f"{PREFIX}snapshots_brought_back_total",
    "Snapshots that were copied from host memory back to the pool.",
)
HELD_BACK = Series(
    f"{PREFIX}held_back",
    "Prompts that wait until conversations which are expected to go on leave room.",
)

ARRIVAL_REASONS = ("options", "unserved", "field")
"""Of the tokenizer process, which sees a request first."""
QUEUE_REASONS = ("options", "too_long", "out_of_memory", "error")
"""Of a scheduler."""
REFUSED = Series(
    f"{PREFIX}refused_requests_total",
    "Requests that KV-Compress has refused or ended.",
    "reason",
    tuple(dict.fromkeys((*ARRIVAL_REASONS, *QUEUE_REASONS))),
)

SERIES = (
    *(LOGICAL, RESIDENT, RATIO, TAIL, PASSES, DEFERRED, SECONDS, MOVED),
    *(SNAPSHOTS, SNAPSHOT_TOKENS, HITS, EVICTIONS, IN_HOST, BROUGHT_BACK),
    *(HELD_BACK, REFUSED),
)
