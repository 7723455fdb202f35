"""Count the tokens that the pool can still take, in this step and in later ones.

SGLang admits a prompt if the pool holds it beside all that running requests may still
add. A compressed prompt is large for one step, in which nothing else grows, and small
afterwards. Charging both at once keeps out requests that would fit, so two sums are
kept of what must stay free:

========  ==========================  =================================================
sum       for a running request       for a prompt that will be compressed
========  ==========================  =================================================
*now*     nothing                     its new tokens and the packed copy
*steady*  what it can still grow to   the budget, an interval and slack
========  ==========================  =================================================

Everything else counts in both sums with SGLang's own charge. The pass behind the step
is settled before another step is scheduled.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sglang_kvc.config.pages import ceil_tokens
from sglang_kvc.scheduling.attached import policy_of, state_of
from sglang_kvc.scheduling.lengths import LATE_PASS_SLACK, tokens_left
from sglang_kvc.scheduling.policy import RequestPolicy
from sglang_kvc.upstream.generation import UPSTREAM
from sglang_kvc.upstream.types import PrefillAdder, Req


def growth_bound(req: Req, stock: float) -> float:
    """Tokens that a running request can still add to the pool.

    SGLang's charge, `stock`, is a guess: it takes a part of the tokens that are still
    allowed, because most requests end early. That guess serves for what a budget grows
    by with the request, not for its tail: requests that started together fill an
    interval together.
    """
    policy, state = policy_of(req), state_of(req)
    if policy is None or state is None:
        return stock
    length = UPSTREAM.committed_len(req)
    due = state.next_due(length)
    if due is None:
        return stock
    bound = due + LATE_PASS_SLACK - length
    if state.fold:
        bound += _budget_growth(policy, length, int(stock))
    if policy.answer:
        # What it decodes is kept for long, so SGLang's guess serves for that, too.
        tail = policy.growth(policy.budget(length))
        bound = min(bound, ceil_tokens(int(stock)) + tail + LATE_PASS_SLACK)
    return min(ceil_tokens(tokens_left(req)), bound)


def running_charge(adder: PrefillAdder, req: Req, stock: float) -> float:
    """Tokens that SGLang's adder counts for a running request.

    While it looks for requests to preempt, that is what one of them would give back;
    else what it can still grow to.
    """
    growth = growth_bound(req, stock) if stock > 0 else stock
    headroom: Headroom | None = getattr(adder, "kv_compress_headroom", None)
    preempting = headroom is not None and headroom.preempting
    if not preempting or not UPSTREAM.holds_memory(req):
        return growth
    state = state_of(req)
    held = UPSTREAM.allocated_len(req)
    if state is not None and state.fold:
        held = state.own(UPSTREAM.committed_len(req))
    ring = state.ring_tokens if state is not None else 0
    return growth + ceil_tokens(held) + ring


def _budget_growth(policy: RequestPolicy, length: int, tokens: int) -> int:
    """Tokens by which the budget itself grows, with a rate."""
    return policy.budget(length + ceil_tokens(tokens)) - policy.budget(length)


class Headroom:
    """Sums *now* and *steady* of one round of admission.

    SGLang's PrefillAdder knows one sum. It is set to the greater of both, but for
    the time of `charged_now`.

    Parameters
    ----------
    adder : as its constructor left it: its offset is *steady* (`growth_bound`).
    """

    def __init__(self, adder: PrefillAdder) -> None:
        # The adder holds this object; a circle would wait for the garbage collector.
        self._adder = weakref.ref(adder)
        running = adder.running_batch
        self.running: list[Any] = running.reqs if running is not None else []
        self.steady = self._known = UPSTREAM.charged(adder)
        self.now = 0.0
        self.preempting = False

    @classmethod
    def of(cls, adder: PrefillAdder) -> Headroom:
        """The headroom of this round, with what SGLang has charged by itself since."""
        headroom: Headroom | None = getattr(adder, "kv_compress_headroom", None)
        if headroom is None:
            headroom = cls(adder)
            setattr(adder, "kv_compress_headroom", headroom)  # noqa: B010
        headroom._sync()
        return headroom

    @property
    def adder(self) -> PrefillAdder:
        """SGLang's adder of this round."""
        adder = self._adder()
        assert adder is not None
        return adder

    def _sync(self) -> None:
        charged = UPSTREAM.charged(self.adder) - self._known
        self.now += charged
        self.steady += charged
        self._publish()

    def _publish(self) -> None:
        self._known = max(self.now, self.steady)
        UPSTREAM.set_charged(self.adder, self._known)

    @property
    def free(self) -> int:
        """Free and evictable tokens of the pool."""
        return int(self.adder.rem_total_tokens + UPSTREAM.charged(self.adder))

    @contextmanager
    def charged_now(self, steady: int, more: int) -> Iterator[None]:
        """Admit a request on the sum *now* alone.

        Parameters
        ----------
        steady : what the request counts for in the other sum, once it is admitted.
        more : what it counts for in this one beyond SGLang's charge.
        """
        adder = self.adder
        before = len(adder.can_run_list)
        UPSTREAM.set_charged(adder, self.now + more)
        try:
            yield
        finally:
            if len(adder.can_run_list) > before:
                self.now = UPSTREAM.charged(adder)
                self.steady += steady
            self._publish()

    @contextmanager
    def charged_also(self, tokens: int) -> Iterator[None]:
        """Let SGLang find `tokens` fewer, from now on if it admits the request."""
        adder = self.adder
        before = len(adder.can_run_list)
        UPSTREAM.set_charged(adder, UPSTREAM.charged(adder) + tokens)
        try:
            yield
        finally:
            if len(adder.can_run_list) == before:
                UPSTREAM.set_charged(adder, UPSTREAM.charged(adder) - tokens)
            self._sync()

    def preempt(self, call: Callable[[], bool]) -> bool:
        """Run `call`, which preempts running requests, and keep both sums right.

        What the preempted ones held is free already. What they could still grow to was
        part of the sum *steady*, and of no other.
        """
        adder = self.adder
        growth = {id(req): self._growth(req) for req in self.running}
        before = len(adder.preempt_list)
        self.preempting = True
        try:
            return call()
        finally:
            self.preempting = False
            gone = {id(req) for req in adder.preempt_list[before:]}
            self.steady -= sum(growth.get(req, 0) for req in gone)
            self.running = [req for req in self.running if id(req) not in gone]
            self._publish()

    def _growth(self, req: Req) -> float:
        charge: float = self.adder._get_running_request_total_token_offset(req)
        return charge

    def squeeze(self, missing: float, due_lens: Any) -> bool:
        """Make passes due at once if what they free lets the next prompt in.

        Tails between two passes are memory that a pass gives back. Longest tails go
        first; passes in flight and due ones are counted before any other.

        Parameters
        ----------
        missing : tokens by which the sum *now* is exceeded.
        due_lens : [slots], see `PassScheduler`; written.

        Returns
        -------
        bool
            Whether the tokens will be there once all passes are settled.
        """
        candidates = []
        for req in self.running:
            state = state_of(req)
            if state is None or not state.fold:
                continue
            missing -= sum(it.decision.gain for it in state.in_flight)
            length = UPSTREAM.committed_len(req)
            gain = state.gain(length)
            if state.in_flight or gain <= 0:
                continue
            if due_lens[state.slot] <= length:
                missing -= gain
            else:
                candidates.append((gain, state.slot, length))
        chosen = []
        for gain, slot, length in sorted(candidates, reverse=True):
            if missing <= 0:
                break
            missing -= gain
            chosen.append((slot, length))
        if missing > 0:
            return False
        for slot, length in chosen:
            due_lens[slot] = length
        return True
