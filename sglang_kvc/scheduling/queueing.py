"""Requests on their way into the queue and back: refused, preempted, retracted.

Called from the hooks on SGLang's scheduler. A request never disappears: it is in the
queue, in a batch, or its sender has been told why not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT

from sglang_kvc.scheduling.acceptance import (
    attach_policy,
    course_of,
    readmit,
)
from sglang_kvc.scheduling.attached import refusal_of
from sglang_kvc.scheduling.refusal import Reason, Refusal
from sglang_kvc.scheduling.resuming import forget_hit
from sglang_kvc.upstream.generation import UPSTREAM
from sglang_kvc.upstream.types import Req, Scheduler

if TYPE_CHECKING:
    from sglang_kvc.scheduling.server import Server


def enqueue(
    scheduler: Scheduler, server: Server, req: Req, call: Callable[[], None]
) -> None:
    """Run ``Scheduler._add_request_to_queue``, unless the request cannot be served.

    A new request is refused with HTTP 400. One that was served already and cannot come
    back ends with HTTP 503 and what it has generated.
    """
    if req.finished_reason is None and req.to_finish is None:
        attach_policy(req, server)
        forget_hit(req)
        refusal = refusal_of(req) or readmit(req)
        if refusal is not None:
            end(scheduler, server, req, refusal)
            return
    call()


def end(scheduler: Scheduler, server: Server, req: Req, refusal: Refusal) -> None:
    """End a request that is in no queue and no batch; tell its sender why."""
    status, message = refusal.reason.status, refusal.message
    meter = server.pass_scheduler.meter
    if meter is not None:
        meter.refused(refusal.reason)
    name = "BadRequestError" if status is HTTPStatus.BAD_REQUEST else status.phrase
    req.finished_reason = FINISH_ABORT(message, status, name)
    req.time_stats.trace_ctx.abort(abort_info={"reason": message})
    scheduler.ipc_channels.send_to_tokenizer.send_output(
        AbortReq(rid=req.rid, finished_reason=req.finished_reason.to_json()), req
    )


def before_admission(scheduler: Scheduler) -> None:
    """Begin a round of admission: keep snapshots for those whose turn comes next.

    They also go first, and newcomers wait for those who are expected back, but where
    requests have priorities. With host memory nobody is lost, so newcomers do not wait.
    """
    tree = scheduler.tree_cache
    if getattr(tree, "sessions", None) is None:
        return
    pool_tokens = scheduler.token_to_kv_pool_allocator.size
    if (last := scheduler.last_batch) is not None:
        prompts = last.forward_mode.is_extend() and last.extend_num_tokens
        tree.expected.count(tree.sessions, prompts or 0)
    queue = scheduler.waiting_queue
    tree.awaiting.update(queue, pool_tokens)
    if scheduler.enable_priority_scheduling:
        return
    newcomers = len(queue) - len(tree.awaiting)
    if tree.sessions.host is None:
        tree.expected.look(tree.sessions, pool_tokens, newcomers)
    if newcomers and len(tree.awaiting):
        queue[:] = tree.expected.order(queue, tree.awaiting.who)


def after_admission(scheduler: Scheduler, server: Server) -> None:
    """Finish a round of admission: nobody is lost, nobody waits for ever.

    SGLang forgets the requests that it has preempted if the one that they made room for
    is not admitted all the same.
    """
    passes = server.pass_scheduler
    waiting = {id(req) for req in scheduler.waiting_queue}
    preempted, passes.preempted = passes.preempted, []
    for req in preempted:
        if (
            not UPSTREAM.holds_memory(req)
            and req.finished_reason is None
            and id(req) not in waiting
        ):
            scheduler._add_request_to_queue(req)
    stuck, passes.stuck = passes.stuck, None
    if stuck is not None and id(stuck) in waiting:
        scheduler.waiting_queue = [r for r in scheduler.waiting_queue if r is not stuck]
        end(scheduler, server, stuck, _stuck(stuck))


def _stuck(req: Req) -> Refusal:
    message = (
        f"The request of {len(req.origin_input_ids)} tokens does not fit in an empty "
        f"KV pool ({course_of(req)}), although it was accepted. That is an error of "
        "the server; please report it with this message."
    )
    return Refusal(Reason.ERROR, message)


def retract(result: tuple[list[Req], float, list[Req]]) -> Any:
    """Take the last request of a full pool back into the queue instead of ending it.

    Memory that is held elsewhere comes back, and what the request has grown since its
    last pass is compressed when it returns. `readmit` judges whether it can.
    """
    retracted, ratio, aborted = result
    for req in aborted:
        req.to_finish = None
    return [*retracted, *aborted], ratio, []


def retraction_order(reqs: list[Req], order: Iterable[int]) -> list[int]:
    """Order of requests, what could not come back first: SGLang retracts the last."""
    return sorted(order, key=lambda index: course_of(reqs[index]) is not None)
