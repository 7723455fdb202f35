"""What we hang on SGLang's objects: one getter and one setter for each.

================= ============= ==================== ===================== =============
on                what          written by           read by               dies with
================= ============= ==================== ===================== =============
a request         policy        `acceptance`         all of this package   the request
a request         refusal       `acceptance`         `queueing`            the request
a request         course        `acceptance`         `acceptance`          the request
a request         state         `passes`             all of this package   its memory
a batch           plan          `passes`             `attention.step`      its step
a batch's result  passes        `attention.step`     the result's hook     the result
an adder          headroom      `headroom`           `headroom`            its round
================= ============= ==================== ===================== =============

An attribute of ours begins with ``kv_compress_``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_kvc.upstream.types import Req

if TYPE_CHECKING:
    from sglang_kvc.scheduling.course import Course
    from sglang_kvc.scheduling.policy import RequestPolicy
    from sglang_kvc.scheduling.request_state import PassInFlight, RequestState
    from sglang_kvc.scheduling.step_plan import StepPlan


def policy_of(req: Req) -> RequestPolicy | None:
    """When and how far the request is compressed; None before it was looked at."""
    return getattr(req, "kv_compress_policy", None)


def attach_policy(req: Req, policy: RequestPolicy) -> None:
    """Once, on the request's way into the queue."""
    _set(req, "policy", policy)


def refusal_of(req: Req) -> str | None:
    """Why the request cannot be served, in words for its sender."""
    return getattr(req, "kv_compress_refusal", None)


def attach_refusal(req: Req, refusal: str) -> None:
    """Keep it until the request is to be queued."""
    _set(req, "refusal", refusal)


def known_course(req: Req) -> tuple[tuple[Any, ...], Course | None] | None:
    """The course that was worked out last, behind what it was worked out from."""
    return getattr(req, "kv_compress_course", None)


def attach_course(req: Req, key: tuple[Any, ...], course: Course | None) -> None:
    """Keep a course for as long as its key stays the same."""
    _set(req, "course", (key, course))


def state_of(req: Req) -> RequestState | None:
    """Compression state of a request; it lives and dies with the request's KV."""
    state: RequestState | None = getattr(req, "kv_compress_state", None)
    return state if state is not None and state.kv is req.kv else None


def attach_state(req: Req, state: RequestState) -> None:
    """At the first prefill step of an admission."""
    _set(req, "state", state)


def attach_plan(batch: Any, plan: StepPlan) -> None:
    """For the step that the batch is about to run."""
    _set(batch, "plan", plan)


def take_plan(batch: Any) -> StepPlan | None:
    """The batch's plan, which is not for its next step."""
    plan: StepPlan | None = getattr(batch, "kv_compress_plan", None)
    if plan is not None:
        _set(batch, "plan", None)
    return plan


def attach_passes(result: Any, passes: list[PassInFlight]) -> None:
    """What ran behind the forward that gave this result."""
    _set(result, "passes", passes)


def passes_of(result: Any) -> list[PassInFlight]:
    """Passes behind a forward; none if nothing was attached."""
    passes: list[PassInFlight] = getattr(result, "kv_compress_passes", [])
    return passes


def _set(owner: Any, name: str, value: Any) -> None:
    setattr(owner, f"kv_compress_{name}", value)
