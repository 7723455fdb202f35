"""From what SGLang calls a target with to our runtime, for `Patch.runtime_from`.

Each function takes all arguments of the target and gives None when KV-Compress is off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_kvc.runtime import runtime_of
from sglang_kvc.scheduling.attached import runtime_of_collector

if TYPE_CHECKING:
    from sglang_kvc.runtime import KVCompressRuntime


def of_holder(holder: Any, *_args: Any, **_kwargs: Any) -> KVCompressRuntime | None:
    """Of a Scheduler, a ScheduleBatch or a PrefillAdder: they hold the allocator."""
    return runtime_of(holder.token_to_kv_pool_allocator)


def of_worker(worker: Any, *_args: Any, **_kwargs: Any) -> KVCompressRuntime | None:
    """Of a TpModelWorker."""
    return runtime_of(worker.model_runner.token_to_kv_pool_allocator)


def of_collector(
    collector: Any, *_args: Any, **_kwargs: Any
) -> KVCompressRuntime | None:
    """Of a SchedulerMetricsCollector that `KVCompressRuntime.watch` has seen."""
    runtime: KVCompressRuntime | None = runtime_of_collector(collector)
    return runtime


def of_checker(checker: Any, *_args: Any, **_kwargs: Any) -> KVCompressRuntime | None:
    """Of a SchedulerInvariantChecker."""
    return runtime_of(checker.tree_cache.token_to_kv_pool_allocator)
