"""Run one step of the worker: what the plan asks for, around SGLang's forward."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from sglang_kvc.attention.probe import run_probe
from sglang_kvc.attention.rank_check import check_ranks
from sglang_kvc.attention.step_context import forwards_with
from sglang_kvc.runtime import KVCompressRuntime
from sglang_kvc.scheduling.attached import attach_passes, take_plan
from sglang_kvc.upstream.generation import UPSTREAM


def run_step(runtime: KVCompressRuntime, worker: Any, batch: Any, forward: Any) -> Any:
    """Run ``forward_batch_generation`` between resets and passes, on its stream."""
    plan = take_plan(batch)
    if runtime.checks_ranks:
        check_ranks(plan, batch)
    if plan is None:
        return forward()
    if plan.copies:
        assert runtime.state.host is not None
        runtime.state.host.copy_all(plan.copies)
    if plan.reset_slots:
        runtime.state.reset_slots(plan.reset_slots)
    if plan.resumed:
        runtime.state.resume_slots(plan.resumed)
    if plan.rings:
        runtime.state.set_rings(
            {slot: ring.token_ids for slot, ring in plan.rings.items()}
        )
    with forwards_with(worker.model_runner, plan.folds):
        result = forward()
    if plan.passes:
        watch = runtime.stopwatch
        with nullcontext() if watch is None else watch.running():
            for launched in plan.passes:
                if launched.probe is not None:
                    run_probe(runtime, worker.model_runner, launched)
            runtime.passes.run(plan.passes)
        attach_passes(result, plan.passes)
        runtime.pass_scheduler.launched = plan.passes
        # The scheduling stream may go on once the forward has read the request table;
        # a pass reads it later, so make SGLang wait for the whole step instead.
        UPSTREAM.wait_for_step(worker)
    return result
