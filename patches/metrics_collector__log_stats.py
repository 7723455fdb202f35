"""Set our gauges when SGLang sets its own."""

from __future__ import annotations

from typing import Any

from sglang_kvc.patches.runtimes import of_collector
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.observability.metrics_collector:SchedulerMetricsCollector.log_stats",
    hook_type=HookType.AFTER,
    expected_params=("self", "stats"),
    reason=(
        "What runs is looked at where SGLang reports its steps, at its interval, and "
        "not in every step."
    ),
    upstream_link="observability/metrics_collector.py:1646",
    remove_when="SGLang lets a backend add gauges to its collector.",
    runtime_from=of_collector,
)


def hook(result: Any, runtime: Any, collector: Any, stats: Any) -> None:
    """Look at the running requests."""
    del result, collector, stats
    runtime.pass_scheduler.meter.log()
