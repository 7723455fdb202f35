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
        own = logits.float().log_softmax(-1)
        for row, param in enumerate(params):
            job, req = param[KEY], param["__req__"]
            # Counts in launch order, so neither overlap, nor retraction, nor the
            # samples of a prompt's middle chunks put it out of step.
            at = req.kv_committed_len - len(req.origin_input_ids)
            if 0 <= at < len(job["tokens"]):
                values = observe(own[row], job, at)
                logits[row] = own[row]
                logits[row, job["channels"]] = values.to(logits)
                logits[row, job["tokens"][at]] = LIFT
        return logits


def observe(own: Any, job: Mapping[str, Any], at: int) -> Any:
    """Values of the channels, as one tensor: no transfer to the host in a step."""
    import torch

    target = own[job["tokens"][at]]
    best = own.argmax()
    if not job.get("ids"):
        agree = (best == job["tokens"][at]).to(own)
        return torch.stack([target, agree, torch.zeros_like(target)])
    ids = torch.tensor(job["ids"][at], device=own.device)
    theirs = torch.tensor(job["logprobs"][at], device=own.device)
    agree = (best == ids[theirs.argmax()]).to(own)
    rest = (1 - theirs.exp().sum()).clamp_min(1e-7)
    own_rest = (1 - own[ids].exp().sum()).clamp_min(1e-7)
    kl = (theirs.exp() * (theirs - own[ids])).sum() + rest * (rest / own_rest).log()
    return torch.stack([target, agree, kl.clamp(0, CLAMP)])


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
