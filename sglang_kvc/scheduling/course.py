"""Choose how a request will be served on this server, if it can be at all.

This is the one place that decides it. `course` judges a request as if it were alone:
it takes the first way whose memory fits in the empty pool, with the numbers that
admission then asks of a pool in use (`admission`, `headroom`). So what has a course is
admitted at the latest when nothing else runs, and what has none is refused at once.
This module imports neither torch nor SGLang.

======= ================================== ============================================
way     when it is compressed              most tokens held until then
======= ================================== ============================================
BETWEEN after every chunk of its prompt    two packed copies and a chunk
AFTER   behind its prompt                  the prompt and its packed copy
LATER   while it decodes, or behind its    the length at which a pass is due, the copy
        `delay`
KEEP    never: not asked for, or no copy   all its tokens
        fits beside what it holds
======= ================================== ============================================
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, auto

from sglang_kvc.config.pages import PAGE_SIZE, ceil_tokens, floor_tokens
from sglang_kvc.scheduling.lengths import LATE_PASS_SLACK, UNLIMITED
from sglang_kvc.scheduling.policy import RequestPolicy


class Way(Enum):
    """When a request is compressed, see the module's table."""

    BETWEEN = auto()
    AFTER = auto()
    LATER = auto()
    KEEP = auto()


@dataclass(frozen=True)
class Course:
    """One way of serving a request, and the memory that it takes, in tokens.

    Attributes
    ----------
    way : when the request is compressed.
    step : most that it holds until its first pass is settled, the prompt and a cached
        prefix included; with KEEP and LATER: as far as SGLang's admission looks.
    later : most that it holds afterwards, as far as SGLang's admission looks; 0 with
        KEEP and LATER, whose growth SGLang charges itself.
    copy : what a later pass needs beside that for a moment.
    chunk : with BETWEEN, tokens of a chunk; else 0.
    max_hit : longest cached prefix that it may start from.
    ring : what its last queries take beside all that, from its first step to its end;
        0 if it never reaches a pass.
    """

    way: Way
    step: int
    later: int = 0
    copy: int = 0
    chunk: int = 0
    max_hit: int = UNLIMITED
    ring: int = 0

    def fits(self, pool_tokens: int) -> bool:
        """Whether an empty pool of this size admits it; strict, as SGLang's test."""
        room = pool_tokens - self.ring
        return self.step + PAGE_SIZE < room and self.later + self.copy < room


def course(
    policy: RequestPolicy, length: int, left: int, horizon: int
) -> Course | None:
    """Choose the way in which a request is served.

    Parameters
    ----------
    policy : of the request.
    length : tokens to prefill: the prompt, after a retraction with what was decoded.
    left : tokens that it may still decode.
    horizon : most of them that SGLang's admission looks at.

    Returns
    -------
    Course or None
        None if this pool cannot hold the request in any way.
    """
    ahead = min(left, horizon)
    candidates: list[Course] = []
    if policy.compresses(length):
        budget = policy.budget(length)
        later, copy = _after_first_pass(policy, length, ahead)
        after = Course(
            Way.AFTER,
            length + budget + PAGE_SIZE,
            later,
            copy,
            ring=policy.ring_tokens,
        )
        candidates = [after]
        rule = policy.chunk_rule
        chunk = rule.chunk_tokens(length, budget) if rule is not None else 0
        if rule is not None and chunk:
            between = Course(
                Way.BETWEEN,
                rule.peak(budget, chunk),
                later,
                copy,
                chunk,
                rule.max_hit(budget, chunk),
                policy.ring_tokens,
            )
            first = rule.prefers(length)
            candidates = [between, after] if first else [after, between]
    elif policy.becomes_due:
        due = policy.first_due(length)
        most = due + policy.budget(due) + LATE_PASS_SLACK + PAGE_SIZE
        if most + PAGE_SIZE < policy.pool_tokens:
            ring = policy.ring_tokens if due <= length + left else 0
            candidates = [Course(Way.LATER, min(length + ahead, most), ring=ring)]
    candidates.append(Course(Way.KEEP, length + ahead))
    fitting = (it for it in candidates if it.fits(policy.whole_pool))
    return next(fitting, None)


def delayed(
    policy: RequestPolicy, length: int, left: int, horizon: int
) -> RequestPolicy:
    """Policy of a new request, whose first pass waits as asked if the pool allows it.

    It waits only where it gets a pass all the same, at a length that it reaches, and
    where its answer may grow as long as without. What is decided holds for its life:
    a retracted request comes back longer, so what it waits for is nearer.

    Parameters
    ----------
    policy : of the request, without a delay.
    length, left, horizon : see `course`; `left` is what it may decode without a delay.
    """
    waiting = replace(policy, delay=policy.asked_delay)
    if not waiting.delay:
        return policy
    way = course(policy, length, left, horizon)
    if way is None or way.way not in (Way.AFTER, Way.LATER):
        # Compressed between chunks, or never.
        return policy
    way = course(waiting, length, left, horizon)
    if way is None or way.way is not Way.LATER:
        return policy
    end = length + left
    # The last token of an answer is in no step.
    is_due = waiting.first_due(length) < end
    return waiting if is_due and end <= reach(waiting, length, horizon) else policy


def reach(policy: RequestPolicy, length: int, horizon: int) -> int:
    """Tokens, prompt and output, that a request can reach at most, alone.

    At least what SGLang allows without compression, but for the ring. With a budget
    there is no end. With a rate the budget grows until no pass finds room for a second
    copy beside it; from then on the request keeps everything.

    Parameters
    ----------
    policy, length, horizon : see `course`.
    """
    part = PAGE_SIZE + 1 + (ceil_tokens(length) - length)
    if not policy.enabled:
        return policy.whole_pool - part
    way = course(policy, length, 0, 0)
    if way is None or way.way is Way.KEEP:
        return policy.whole_pool - part
    if not policy.passes_end:
        return UNLIMITED
    pool, later = policy.pool_tokens, way.way is Way.LATER
    whole, unobserved = pool - part, policy.whole_pool - part
    start = policy.first_due(length) if later else floor_tokens(length)
    # A request that grows so long may not be compressed at all, and takes no ring; nor
    # does one that ends before its first pass.
    grown = course(policy, length, unobserved - length, horizon)
    if grown is not None and not grown.ring:
        whole = unobserved
    elif later:
        whole = max(whole, min(unobserved, start - 1))
    packed, fold = _last_fold(policy, start)
    return max(whole, pool - PAGE_SIZE - 1 - packed + fold)


def _last_fold(policy: RequestPolicy, start: int) -> tuple[int, int]:
    """Packed tokens and fold that the last possible pass leaves, at worst.

    `start` is the fold of the first pass.
    """
    last = policy.last_pass
    if start > last:
        return policy.budget(start + PAGE_SIZE), start
    packed = policy.budget(last)
    return packed, max(
        start, floor_tokens(last - policy.growth(packed) - LATE_PASS_SLACK)
    )


def _after_first_pass(
    policy: RequestPolicy, length: int, ahead: int
) -> tuple[int, int]:
    """`Course.later` and `Course.copy` of a request whose prompt is compressed."""
    end, last = length + ahead, policy.last_pass
    held = 0
    if end > last:
        # No pass after `last`: from there on it keeps everything.
        packed, fold = _last_fold(policy, floor_tokens(length))
        held = packed + end - fold + PAGE_SIZE
    if length > last:
        return held, 0
    packed = policy.budget(min(end, last))
    passing = packed + policy.growth(packed) + LATE_PASS_SLACK
    later = max(held, passing)
    return later, max(passing + policy.budget(length) - later, 0)
