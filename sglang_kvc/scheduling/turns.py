"""A decode step between two prefills, so that prompts do not hold up the answers.

Stock SGLang runs waiting prompts one after another, and who has an answer to come waits
for all of them. From 0.5.22 on it can be told to take turns: `config.server_args` sets
``--prefill-decode-interval 1``. For 0.5.17 that is done here.
"""

from __future__ import annotations

from typing import Any

from sglang_kvc.upstream.types import Scheduler


def decode_first(scheduler: Scheduler, running_batch: Any) -> bool:
    """Whether a decode step goes before the next prefill: the last step was one."""
    last = scheduler.last_batch
    return (
        last is not None
        and last.forward_mode.is_extend()
        and answers_wait(running_batch)
    )


def answers_wait(running_batch: Any) -> bool:
    """Whether a decode step would give anybody a token.

    One token may be on its way. A request that it completes would decode for nothing,
    which would cost loads of one-token answers a step for each prefill.
    """
    return any(
        not req.finished()
        and len(req.output_ids) + 1 < req.sampling_params.max_new_tokens
        for req in running_batch.reqs
    )
