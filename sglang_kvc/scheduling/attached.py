"""Records that we hang on SGLang's objects: one getter and one setter for each.

================= ============= ==================== ===================== =============
on                what          written by           read by               dies with
================= ============= ==================== ===================== =============
a request         policy        `acceptance`,        all of this package   the request
                                `resuming`
a request         refusal       `acceptance`         `queueing`            the request
a request         course        `acceptance`         `acceptance`          the request
a request         state         `passes`             all of this package   its memory
a request         text          here                 `resuming`, `keeping` the request
a request         prefix_cap    `acceptance`         `resuming`            the request
a request         hit           `resuming`           `passes`, the tree    its admission
a batch           plan          `passes`             `attention.step`      its step
a batch's result  passes        `attention.step`     the result's hook     the result
an adder          headroom      `headroom`           `headroom`            its round
a collector       runtime       `runtime`            the collector's hook  the server
================= ============= ==================== ===================== =============

An attribute of ours begins with ``kv_compress_``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_kvc.sessions.snapshot import Hit
from sglang_kvc.sessions.text import TextChain
from sglang_kvc.upstream.generation import UPSTREAM
from sglang_kvc.upstream.types import Req

if TYPE_CHECKING:
    from sglang_kvc.scheduling.course import Course
    from sglang_kvc.scheduling.policy import RequestPolicy
    from sglang_kvc.scheduling.refusal import Refusal
    from sglang_kvc.scheduling.request_state import PassInFlight, RequestState
    from sglang_kvc.scheduling.step_plan import StepPlan


def policy_of(req: Req) -> RequestPolicy | None:
    """Policy of a request; None before it was looked at."""
    return getattr(req, "kv_compress_policy", None)


def attach_policy(req: Req, policy: RequestPolicy) -> None:
    """Hang a policy on a request, on its way into the queue or when it resumes."""
    _set(req, "policy", policy)


def refusal_of(req: Req) -> Refusal | None:
    """Refusal of a request; None if it can be served."""
    return getattr(req, "kv_compress_refusal", None)


def attach_refusal(req: Req, refusal: Refusal) -> None:
    """Hang a refusal on a request until it is to be queued."""
    _set(req, "refusal", refusal)


def known_course(req: Req) -> tuple[tuple[Any, ...], Course | None] | None:
    """Course of a request that was worked out last, behind the key it was made from."""
    return getattr(req, "kv_compress_course", None)


def attach_course(req: Req, key: tuple[Any, ...], course: Course | None) -> None:
    """Hang a course on a request; it holds for as long as its key stays the same."""
    _set(req, "course", (key, course))


def state_of(req: Req) -> RequestState | None:
    """Compression state of a request; it lives and dies with the request's KV."""
    state: RequestState | None = getattr(req, "kv_compress_state", None)
    return state if state is not None and state.kv is req.kv else None


def attach_state(req: Req, state: RequestState) -> None:
    """Hang a state on a request, at the first prefill step of an admission."""
    _set(req, "state", state)


def text_of(req: Req) -> TextChain:
    """The text of a request, whose prefixes have names; it only grows."""
    text: TextChain | None = getattr(req, "kv_compress_text", None)
    if text is None:
        text = TextChain(UPSTREAM.tenant(req))
        _set(req, "text", text)
    return text


def told_by_ids(req: Req) -> bool:
    """Whether the token ids of a request say what is computed for it."""
    return req.input_embeds is None and req.positional_embed_overrides is None


def prefix_cap_of(req: Req) -> int:
    """Longest prefix that SGLang would let a request start from."""
    tokens: int = getattr(req, "kv_compress_prefix_cap", 0)
    return tokens


def attach_prefix_cap(req: Req, tokens: int) -> None:
    """Hang it on a request, whenever SGLang asks for it."""
    _set(req, "prefix_cap", tokens)


def hit_of(req: Req) -> Hit | None:
    """What of a snapshot an admitted request starts from, until it has a state."""
    return getattr(req, "kv_compress_hit", None)


def attach_hit(req: Req, hit: Hit | None) -> None:
    """Hang it on a request while it is admitted, or take it off."""
    _set(req, "hit", hit)


def may_await(req: Req) -> bool:
    """Whether a waiting request may have a snapshot kept for it."""
    return getattr(req, "kv_compress_await", True)


def attach_await(req: Req, may: bool) -> None:
    """Hang it on a request, on its way into the queue or when nothing is kept."""
    _set(req, "await", may)


def attach_plan(batch: Any, plan: StepPlan) -> None:
    """Hang a plan on a batch, for the step that it is about to run."""
    _set(batch, "plan", plan)


def take_plan(batch: Any) -> StepPlan | None:
    """Take a batch's plan off it: it is not for the batch's next step."""
    plan: StepPlan | None = getattr(batch, "kv_compress_plan", None)
    if plan is not None:
        _set(batch, "plan", None)
    return plan


def attach_passes(result: Any, passes: list[PassInFlight]) -> None:
    """Hang the passes that ran behind a forward on its result."""
    _set(result, "passes", passes)


def passes_of(result: Any) -> list[PassInFlight]:
    """Passes behind a forward; none if nothing was attached."""
    passes: list[PassInFlight] = getattr(result, "kv_compress_passes", [])
    return passes


def runtime_of_collector(collector: Any) -> Any:
    """Runtime of the server that a metrics collector counts for; None if not ours."""
    return getattr(collector, "kv_compress_runtime", None)


def attach_runtime(collector: Any, runtime: Any) -> None:
    """Hang a runtime on SGLang's collector, which knows no scheduler."""
    _set(collector, "runtime", runtime)


def _set(owner: Any, name: str, value: Any) -> None:
    setattr(owner, f"kv_compress_{name}", value)
