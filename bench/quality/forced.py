"""Make the engine decode given tokens, and say what it thought of them.

Tokens of a prompt are seen before anything is evicted; to measure what eviction did to
a text, the text must be decoded. `Dictator` is a custom logit processor (SGLang's
``--enable-custom-logit-processor``) that makes each next token the greedy choice. Log
probabilities are taken after processors, so it also writes what it saw into the row of
logits:

* the row becomes log-probabilities, with the dictated token lifted to `LIFT`; a
  softmax over that is a shift by `LIFT`, so the usual top log-probabilities still come
  out, and
* tokens of no interest (`channels`) carry the log-probability of the dictated token,
  whether the most likely token is the reference's, and the divergence from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

KEY = "dictate"
"""Entry of ``custom_params``; SGLang adds the request as ``__req__``."""
LIFT = 64.0
CLAMP = 40.0
"""No channel is larger, so that it takes no part in the softmax: exp(-24)."""
CHANNELS = 3
ABSENT = -1e4
"""Log-probability of the entries that a shorter reference lacks: exp is 0."""
TOP = 32
"""Tokens of a reference distribution; the rest counts as one token."""


@dataclass(frozen=True)
class Reference:
    """Most likely tokens at each position, the dictated one among them."""

    ids: list[list[int]]
    logprobs: list[list[float]]


@dataclass(frozen=True)
class Thoughts:
    """What a model thought at each dictated token.

    Attributes
    ----------
    logprobs : list of float
        Log-probability of the dictated token.
    agree : list of float
        1 where the most likely token is the reference's (without a reference: the
        dictated one).
    divergence : list of float
        KL(reference || this), the reference's unlisted tokens taken as one: a lower
        bound, in nats. Zeros without a reference.
    reference : Reference or None
        This distribution as a reference for others, if it was asked for.
    """

    logprobs: list[float]
    agree: list[float]
    divergence: list[float] = field(default_factory=list)
    reference: Reference | None = None


class Dictator:
    """SGLang calls it with the rows of logits of the requests that dictate."""

    def __call__(self, logits: Any, params: Sequence[Mapping[str, Any]]) -> Any:
        """Overwrite `logits` where a token is dictated; the rest stays as it is."""
        rows, jobs, places = [], [], []
        for row, param in enumerate(params):
            job, req = param[KEY], param["__req__"]
            # Counts in launch order, so neither overlap, nor retraction, nor the
            # samples of a prompt's middle chunks put it out of step.
            at = req.kv_committed_len - len(req.origin_input_ids)
            if 0 <= at < len(job["tokens"]):
                rows.append(row)
                jobs.append(job)
                places.append(at)
        if rows:
            index, targets = _to(logits, rows), _targets(logits, jobs, places)
            own = logits[index].float().log_softmax(-1)
            values = observe(own, jobs, places)
            logits[index] = own.to(logits)
            channels = _to(logits, [job["channels"] for job in jobs])
            logits[index[:, None], channels] = values.to(logits)
            logits[index, targets] = LIFT
        return logits


def _to(like: Any, numbers: Any, dtype: Any = None) -> Any:
    import torch

    return torch.tensor(numbers, dtype=dtype, device=like.device)


def _targets(
    like: Any, jobs: Sequence[Mapping[str, Any]], places: Sequence[int]
) -> Any:
    pairs = zip(jobs, places, strict=True)
    return _to(like, [job["tokens"][at] for job, at in pairs])


def observe(own: Any, jobs: Sequence[Mapping[str, Any]], places: Sequence[int]) -> Any:
    """Values of the channels, one row a job; nothing is transferred to the host.

    Parameters
    ----------
    own : Tensor, [jobs, vocabulary] float32
        Log-probabilities.
    jobs, places : sequences
        What `job` made, and at which of its tokens each is.
    """
    import torch

    targets = _targets(own, jobs, places)
    target = own.gather(1, targets[:, None])[:, 0]
    # Jobs without a reference are compared with the dictated token alone.
    ids = [[job["tokens"][at]] for job, at in zip(jobs, places, strict=True)]
    theirs = [[0.0] for _ in jobs]
    for row, (one, at) in enumerate(zip(jobs, places, strict=True)):
        if one.get("ids"):
            ids[row], theirs[row] = one["ids"][at], one["logprobs"][at]
    width = max(map(len, ids))
    index = _to(own, [[*row, *[0] * (width - len(row))] for row in ids])
    given = _to(own, [[*row, *[ABSENT] * (width - len(row))] for row in theirs])
    held = given > ABSENT
    best = index.gather(1, given.argmax(1)[:, None])[:, 0]
    agree = (own.argmax(1) == best).to(own)
    mine = own.gather(1, index)
    rest = (1 - given.exp().sum(1)).clamp_min(1e-7)
    own_rest = (1 - (mine.exp() * held).sum(1)).clamp_min(1e-7)
    kl = (given.exp() * (given - mine)).sum(1) + rest * (rest / own_rest).log()
    compared = _to(own, [bool(one.get("ids")) for one in jobs])
    kl = torch.where(compared, kl.clamp(0, CLAMP), torch.zeros_like(kl))
    return torch.stack([target, agree, kl], 1)


def processor() -> str:
    """The `Dictator` as SGLang wants it: a string."""
    from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

    return CustomLogitProcessor.to_str.__func__(Dictator)


def unused_ids(tokens: Sequence[int], count: int = CHANNELS) -> list[int]:
    """The first token numbers that do not occur: special tokens, as a rule."""
    used = set(tokens)
    found: list[int] = []
    number = 0
    while len(found) < count:
        if number not in used:
            found.append(number)
        number += 1
    return found


def job(tokens: Sequence[int], reference: Reference | None = None) -> dict[str, Any]:
    """The `KEY` entry of a request's ``custom_params``."""
    entry: dict[str, Any] = {"tokens": list(tokens), "channels": unused_ids(tokens)}
    if reference is not None:
        entry |= {"ids": reference.ids, "logprobs": reference.logprobs}
    return entry


def read(
    meta: Mapping[str, Any], entry: Mapping[str, Any], *, keep: bool = False
) -> Thoughts:
    """Thoughts of an answered request from its ``meta_info``.

    Parameters
    ----------
    meta : mapping
    entry : mapping
        What `job` made for it.
    keep : bool
        Whether to make a `Reference` of its top log-probabilities.
    """
    channels = entry["channels"]
    steps = []
    for step in meta["output_token_ids_logprobs"][: len(entry["tokens"])]:
        values = {number: value + LIFT for value, number, *_ in step}
        steps.append([values[channel] for channel in channels])
    if len(steps) != len(entry["tokens"]):
        raise RuntimeError(
            f"{len(steps)} of {len(entry['tokens'])} dictated tokens came"
        )
    logprobs, agree, divergence = (list(column) for column in zip(*steps, strict=True))
    reference = None
    if keep:
        reference = _reference(meta["output_top_logprobs"], entry, logprobs)
    return Thoughts(logprobs, [float(round(a)) for a in agree], divergence, reference)


def _reference(
    top: Sequence[Any], entry: Mapping[str, Any], logprobs: Sequence[float]
) -> Reference:
    ids, values = [], []
    skipped = set(entry["channels"])
    for step, token, own in zip(top, entry["tokens"], logprobs, strict=False):
        others = [
            (value + LIFT, number)
            for value, number, *_ in step
            if number != token and number not in skipped
        ]
        best = sorted([(own, token), *others], reverse=True)[:TOP]
        # The dictated token counts however unlikely it is.
        if (own, token) not in best:
            best[-1] = (own, token)
        ids.append([number for _, number in best])
        values.append([value for value, _ in best])
    return Reference(ids, values)


def likelihood(logprobs: Sequence[float]) -> float:
    """Geometric mean of the probabilities: 1 / perplexity."""
    return math.exp(sum(logprobs) / len(logprobs)) if logprobs else 0.0
