"""What a request would hold while the full cache decodes: one for every setting."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from bench.quality.scouts.simulate_choice import SINKS, Candidate, keep
from bench.quality.systems import MIN_BUDGET, Setting
from sglang_kvc.config.options import KVCompressOptions
from sglang_kvc.config.pages import PAGE_SIZE
from sglang_kvc.kernels.select import cheapest_by_head
from sglang_kvc.requests.request_options import RequestOptions
from sglang_kvc.scheduling.pass_decision import PassDecision
from sglang_kvc.scheduling.policy import RequestPolicy
from sglang_kvc.scheduling.request_state import RequestState

SHIPPED = Candidate()
"""The server's defaults."""


@dataclass(frozen=True)
class Step:
    """What one query of the answer paid, and to what; shares of all behind the sinks.

    Attributes
    ----------
    evicted_prompt, evicted_answer : to what is not held any more, mean over heads.
    to_answer : to tokens of the answer, held or not.
    prompt, answer : tokens of both that a head holds on average.
    """

    evicted_prompt: float
    evicted_answer: float
    to_answer: float
    prompt: float
    answer: float


class HeldTokens:
    """One request under a setting, whose passes come when a server's would.

    Queries are those of the full cache; at each pass they see what is held.

    Parameters
    ----------
    setting : Setting
    scores : [LH, n] fp32
        Of the prompt, as `Observer.scores` makes them; n is its length.
    layers : int
    """

    def __init__(self, setting: Setting, scores: torch.Tensor, layers: int) -> None:
        self.layers, self.prompt_len = layers, scores.shape[1]
        options = KVCompressOptions(min_budget=MIN_BUDGET)
        asked = RequestOptions(keep=setting, answer=setting.answer)
        policy = RequestPolicy(options, asked, prompt_len=self.prompt_len)
        self.state = RequestState(policy=policy, kv=None, slot=1)
        self.held = torch.ones_like(scores, dtype=torch.bool)
        self.scores = scores
        # Decoded tokens get the mean bonus of the prompt, see `kernels.novelty`.
        self._unit = float(options.distinct_weight * scores.mean())
        decision = self.state.propose_after_chunk(self.prompt_len, self.prompt_len)
        if decision is not None:
            self.held = keep(scores, layers, decision.packed_new, SHIPPED)
            self.state.launch(decision, None, None)
        self._due = self.state.next_due(self.prompt_len)
        self._paid = torch.zeros_like(scores)

    def decode(self, probs: torch.Tensor, norms: torch.Tensor) -> Step:
        """Take in one decoded token, and run the pass that is due behind it.

        Parameters
        ----------
        probs : [LH, G, n] fp32
            What its queries pay in the full cache, to themselves, too.
        norms : [LH, n] fp32
            Of all values.
        """
        length = probs.shape[2]
        self.held = pad(self.held, (0, length - self.held.shape[1]), value=True)
        step = self._step(probs.mean(1))
        if self._due is None:
            return step
        window = self.state.policy.options.window
        if length > self._due - window:
            seen = probs * self.held[:, None]
            seen = seen / seen.sum(2, keepdim=True).clamp_min(1e-12)
            paid = seen.square().sum(1) * norms
            self._paid = pad(self._paid, (0, length - self._paid.shape[1])) + paid
        if length >= self._due:
            decision = self.state.propose_while_decoding(length)
            if decision is not None:
                self._run(decision)
            self._due = self.state.next_due(length)
        return step

    def _step(self, paid: torch.Tensor) -> Step:
        """Shares of what the query of each head paid, [LH, n]."""
        beyond = paid.clone()
        beyond[:, :SINKS] = 0
        beyond /= beyond.sum(1, keepdim=True).clamp_min(1e-12)
        lost = beyond.masked_fill(self.held, 0)
        n, heads = self.prompt_len, len(paid)
        return Step(
            evicted_prompt=lost[:, :n].sum().item() / heads,
            evicted_answer=lost[:, n:].sum().item() / heads,
            to_answer=beyond[:, n:].sum().item() / heads,
            prompt=self.held[:, :n].sum().item() / heads,
            answer=self.held[:, n:].sum().item() / heads,
        )

    def _run(self, decision: PassDecision) -> None:
        """One pass while decoding: every layer loses as many blocks as it gained."""
        length, fold = decision.seq_len, decision.fold_new
        more = length - self.scores.shape[1]
        # What is decoded since the last pass is folded by this one.
        scores = pad(self.scores, (0, more), value=self._unit) + self._paid
        evict = (decision.gain - decision.packed_new) // PAGE_SIZE * len(scores)
        first = decision.is_first
        self.held = choose_later(
            scores,
            self.held,
            fold=fold,
            protected=length - decision.protected,
            evict=evict,
            groups=1 if first else self.layers,
        )
        self.scores = scores
        self._paid = torch.zeros_like(scores)
        self.state.launch(decision, None, None)


def choose_later(
    scores: torch.Tensor,
    held: torch.Tensor,
    *,
    fold: int,
    protected: int,
    evict: int,
    groups: int,
) -> torch.Tensor:
    """What stays of what is held: the cheapest blocks of each group go.

    Parameters
    ----------
    scores, held : [LH, n] fp32 and bool
    fold : int
        Tokens before it compete.
    protected : int
        First token that must stay.
    evict : int
        Blocks that go, over all heads.
    groups : int
        Of consecutive heads, that lose equally many.

    Returns
    -------
    [LH, n] bool
    """
    own = scores[:, :fold].masked_fill(~held[:, :fold], torch.inf)
    own[:, :SINKS] = own[:, protected:] = torch.inf
    order = own.argsort(dim=1, stable=True)
    price = own.gather(1, order)[:, PAGE_SIZE - 1 :: PAGE_SIZE]
    blocks = held[:, :fold].sum(1) // PAGE_SIZE
    exists = torch.arange(price.shape[1], device=price.device) < blocks[:, None]
    lost = cheapest_by_head(price, exists, evict, groups)
    gone = torch.arange(fold, device=price.device) < PAGE_SIZE * lost[:, None]
    stays = held.clone()
    stays[:, :fold] &= ~torch.zeros_like(gone).scatter_(1, order, gone)
    return stays
