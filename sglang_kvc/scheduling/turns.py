"""Decode steps between two prefills, so that prompts do not hold up the answers.

Stock SGLang runs waiting prompts one after another, and who has an answer to come waits
for all of them. Here a few decode steps go between, by default two: SGLang hands out
the tokens of a step when it has launched the next one, so those of a single step would
wait for the launch of a prefill. If as many prompts wait as requests run, prompts go
first as in SGLang: then it pays to fill the batch. And a prefill that answers wait for
is short: a longer prompt is cut, and prompts share one only if they fit.
"""

from __future__ import annotations

from typing import Any

from sglang_kvc.upstream.types import Scheduler

TURN_TOKENS = 1024
"""New tokens of a prefill that answers wait for, a multiple of a page."""


class Turns:
    """Whose turn it is, prompts' or answers', on one server.

    Attributes
    ----------
    tokens : new tokens of a prefill that answers wait for; only tests change it.
    """

    def __init__(self) -> None:
        self.tokens = TURN_TOKENS
        self._decoded = 0
        self._hurry = False

    def decode_first(
        self, scheduler: Scheduler, running_batch: Any, steps: int
    ) -> bool:
        """Whether the next step is a decode step whoever waits; ask once a step.

        Parameters
        ----------
        scheduler : SGLang's Scheduler, about to look for prompts.
        running_batch : what would decode.
        steps : decode steps between two prefills.
        """
        last = scheduler.last_batch
        if last is not None and last.forward_mode.is_extend():
            self._decoded = 0
        else:
            self._decoded += 1
        waiting = len(scheduler.waiting_queue) + (scheduler.chunked_req is not None)
        if expected := getattr(scheduler.tree_cache, "expected", None):
            # They would not fill the batch.
            waiting -= expected.held_back
        few = steps > 0 and waiting < len(running_batch.reqs)
        self._hurry = few and _answers_wait(running_batch)
        return self._hurry and self._decoded < steps

    def longest(self, chunk: int) -> int:
        """New tokens that a prefill takes at most; `chunk` if no answers wait."""
        return min(chunk, self.tokens) if self._hurry else chunk

    def takes(self, taken: int, more: int) -> bool:
        """Whether a prefill takes another prompt.

        Parameters
        ----------
        taken : new tokens of the prompts that it has.
        more : new tokens of this one.
        """
        alone = not taken or not self._hurry
        return alone or taken + more <= self.tokens


def _answers_wait(running_batch: Any) -> bool:
    """Whether a decode step would give anybody a token.

    One token may be on its way. A request that it completes would decode for nothing.
    """
    return any(
        not req.finished()
        and len(req.output_ids) + 1 < req.sampling_params.max_new_tokens
        for req in running_batch.reqs
    )
