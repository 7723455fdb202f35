"""What a prompt asks of the pool when it, or its next chunk, is to be admitted."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_kvc.scheduling.acceptance import course_of
from sglang_kvc.scheduling.attached import hit_of, policy_of, state_of
from sglang_kvc.scheduling.course import Course
from sglang_kvc.scheduling.lengths import tokens_left
from sglang_kvc.scheduling.policy import RequestPolicy
from sglang_kvc.upstream.generation import UPSTREAM
from sglang_kvc.upstream.types import Req


@dataclass(frozen=True)
class PromptNeed:
    """Tokens that a prompt asks of a round of admission.

    Attributes
    ----------
    policy, way : of the request.
    length : to be prefilled; after a retraction with what was decoded.
    hit : of the cached prefix that it starts from, or computed by earlier chunks.
    held : of these, what takes memory of its own: a snapshot less than it stands for,
        nothing once the prompt has been compressed between its chunks.
    left : that it may still decode.
    ring : of the pages that its queries will take in this step.
    goes_on : whether most of it is cached, or a part of the answer was given.
    """

    policy: RequestPolicy
    way: Course
    length: int
    hit: int
    held: int
    left: int
    ring: int
    goes_on: bool

    @classmethod
    def of(cls, req: Req) -> PromptNeed | None:
        """Look up what a request needs; None if SGLang serves it without us."""
        policy, way = policy_of(req), course_of(req)
        if policy is None or way is None:
            return None
        state, snapshot, hit = state_of(req), hit_of(req), UPSTREAM.prefix_len(req)
        held = snapshot.held if snapshot is not None else hit
        length = len(req.full_untruncated_fill_ids)
        return cls(
            policy=policy,
            way=way,
            length=length,
            hit=hit,
            held=0 if state is not None and state.fold else held,
            left=tokens_left(req),
            ring=way.ring if state is None else 0,
            goes_on=bool(req.output_ids) or 2 * hit > length,
        )

    @property
    def missing(self) -> int:
        """Tokens still to be computed."""
        return self.length - self.hit

    @property
    def clip(self) -> int:
        """Tokens that SGLang has to charge beside the missing part of the prompt.

        For a prompt that is compressed between chunks the result may be negative:
        SGLang adds it to the whole prompt, of which only a part is ever held. A cached
        prefix is counted by SGLang, when it locks it, and by `Course.max_hit`.
        """
        if not self.way.chunk:
            return self.way.step - self.length
        rule = self.policy.chunk_rule
        assert rule is not None
        budget = self.policy.budget(self.length)
        peak = rule.peak(budget, self.way.chunk, self.held)
        return peak - self.held - self.missing
