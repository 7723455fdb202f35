"""One step of the worker: what the plan asks for, around SGLang's forward."""

from __future__ import annotations

from typing import Any

from sglang_kvc.attention.probe import run_probe
from sglang_kvc.runtime import KVCompressRuntime
from sglang_kvc.scheduling.passes import StepPlan


def run_step(runtime: KVCompressRuntime, worker: Any, batch: Any, forward: Any) -> Any:
    """Around ``forward_batch_generation``: reset, forward, passes; on its stream."""
    plan: StepPlan | None = getattr(batch, "kv_compress_plan", None)
    runtime.prefill_folds = plan.folds if plan is not None else []
    if plan is None:
        return forward()
    batch.kv_compress_plan = None
    if plan.reset_slots:
        runtime.state.reset_slots(plan.reset_slots)
    result = forward()
    if plan.passes:
        for record in plan.passes:
            if record.probe:
                run_probe(runtime, worker.model_runner, record)
        runtime.passes.run(plan.passes)
        result.kv_compress_passes = plan.passes
        runtime.pass_scheduler.launched = plan.passes
        # The scheduling stream may go on once the forward has read the request table;
        # a pass reads it later, so make SGLang wait for the whole step instead.
        worker.war_fastpath_runner.war_fastpath_read_done_event = None
    return result
