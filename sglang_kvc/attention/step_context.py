"""Hand the folds of a step to the attention backend.

They travel with the `StepPlan` on SGLang's ScheduleBatch. The backend sees a
ForwardBatch instead, which SGLang makes inside its worker and copies field by field
before attention is planned, so it cannot carry anything of ours. But SGLang publishes a
ForwardContext around each forward, and keeps one that is published already. Ours has
the folds in it. It is gone when the forward has been launched, also if that fails.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from sglang.srt.model_executor.forward_context import (
    ForwardContext,
    forward_context,
    get_forward_context,
    has_forward_context,
)

from sglang_kvc.attention.prefill import Folds


@dataclass(frozen=True)
class StepContext(ForwardContext):
    """SGLang's context of a forward, and the fold of each request of its batch."""

    folds: Folds = ()


def forwards_with(model_runner: Any, folds: Folds) -> AbstractContextManager[None]:
    """Context in which a forward finds the folds of its batch.

    Parameters
    ----------
    model_runner : SGLang's ModelRunner, which runs the forward.
    folds : of each request; empty when none of them is compressed yet.
    """
    if not folds:
        return nullcontext()
    context = StepContext(attn_backend=model_runner.attn_backend, folds=folds)
    return forward_context(context)


def folds_of_forward() -> Folds:
    """Folds of the forward that is being planned; empty outside of `forwards_with`."""
    context = get_forward_context() if has_forward_context() else None
    return context.folds if isinstance(context, StepContext) else ()
