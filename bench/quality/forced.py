"""Make the engine decode given tokens, and note what it thought of them.

Tokens of a prompt are seen before anything is evicted; to measure what eviction did to
a text, the text must be decoded. `Dictator` is a custom logit processor (SGLang's
``--enable-custom-logit-processor``) that makes each next token the greedy choice.

What it saw it notes on the device, and writes to the job's file with the last token:
SGLang's own log-probabilities of chosen tokens wait for the device once for every
request of every step, which took longer than the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

KEY = "dictate"
"""Entry of ``custom_params``; SGLang adds the request as ``__req__``."""
LIFT = 1e4
"""More than any logit, and finite in half precision."""
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
        This distribution as a reference for others, if it was not given one.
    """

    logprobs: list[float]
    agree: list[float]
    divergence: list[float] = field(default_factory=list)
    reference: Reference | None = None


class Dictator:
    """Logit processor: SGLang calls it with the logits of the requests that dictate."""

    def __call__(self, logits: Any, params: Sequence[Mapping[str, Any]]) -> Any:
        """Lift the tokens that are dictated; other rows stay as they are."""
        # In the scheduler's process; nobody else needs SGLang for a dictation.
        from sglang_kvc.upstream.generation import UPSTREAM

        rows, jobs, places = [], [], []
        for row, param in enumerate(params):
            job, req = param[KEY], param["__req__"]
            # Counts in launch order, so neither overlap, nor retraction, nor the
            # samples of a prompt's middle chunks put it out of step.
            at = UPSTREAM.committed_len(req) - len(req.origin_input_ids)
            if 0 <= at < len(job["tokens"]):
                rows.append(row)
                jobs.append(job)
                places.append(at)
        if rows:
            noted = [i for i, job in enumerate(jobs) if "out" in job]
            if noted and _is_first_rank():
                own = logits[_on(logits, [rows[i] for i in noted])].float()
                note(
                    own.log_softmax(-1),
                    [jobs[i] for i in noted],
                    [places[i] for i in noted],
                )
            logits[_on(logits, rows), _targets(logits, jobs, places)] = LIFT
        return logits


def _is_first_rank() -> bool:
    """Whether this process writes: every rank of an engine sees the same logits."""
    from torch import distributed

    return not distributed.is_initialized() or distributed.get_rank() == 0


_Note = tuple[Any, ...]
_notes: dict[str, dict[int, _Note]] = {}
"""By the file of a job and the place of its token; in the scheduler's process."""


def note(own: Any, jobs: Sequence[Mapping[str, Any]], places: Sequence[int]) -> None:
    """Keep what is seen at one token of each job; write the file with its last one."""
    seen = observe(own, jobs, places)
    compared = [bool(one.get("ids")) for one in jobs]
    best = None if all(compared) else own.topk(min(TOP, own.shape[1]))
    for row, (one, at) in enumerate(zip(jobs, places, strict=True)):
        keep = best and not compared[row]
        top = (best.indices[row], best.values[row]) if keep else ()
        notes = _notes.setdefault(one["out"], {})
        notes[at] = (seen[row], *top)
        if at + 1 == len(one["tokens"]):
            _write(one, _notes.pop(one["out"]))


def _write(one: Mapping[str, Any], notes: Mapping[int, _Note]) -> None:
    import torch

    # One that lacks a token is short, see `read`.
    columns = list(zip(*(notes[at] for at in sorted(notes)), strict=True))
    seen, *top = (torch.stack(column).tolist() for column in columns)
    logprobs, agree, divergence = map(list, zip(*seen, strict=True))
    reference = refer(*top, one["tokens"], logprobs) if top else None
    path = Path(one["out"])
    part = path.with_suffix(".part")
    part.write_text(
        json.dumps(asdict(Thoughts(logprobs, agree, divergence, reference)))
    )
    part.replace(path)


def refer(
    ids: list[list[int]],
    values: list[list[float]],
    tokens: Sequence[int],
    own: Sequence[float],
) -> Reference:
    """The most likely tokens as a reference.

    Parameters
    ----------
    ids, values : [positions, `TOP`]
        The most likely tokens and their log-probabilities; changed in place.
    tokens, own : sequences
        The dictated tokens and theirs.
    """
    # There may be fewer positions than tokens, see `_write`.
    rows = zip(ids, values, tokens, own, strict=False)
    for row_ids, row_values, token, value in rows:
        # The dictated token counts however unlikely it is.
        if token not in row_ids:
            row_ids[-1], row_values[-1] = token, value
    return Reference(ids, values)


def read(one: Mapping[str, Any]) -> Thoughts:
    """What was noted for a job whose request is done.

    Raises
    ------
    RuntimeError
        If not all of its tokens were decoded.
    """
    path = Path(one["out"])
    found = json.loads(path.read_text()) if path.exists() else {"logprobs": []}
    if len(found["logprobs"]) != len(one["tokens"]):
        raise RuntimeError(
            f"{len(found['logprobs'])} of {len(one['tokens'])} dictated tokens came"
        )
    reference = found.pop("reference")
    return Thoughts(**found, reference=Reference(**reference) if reference else None)


def observe(own: Any, jobs: Sequence[Mapping[str, Any]], places: Sequence[int]) -> Any:
    """Log-probability, agreement and divergence, one row a job, on the device.

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
    ids = [[one["tokens"][at]] for one, at in zip(jobs, places, strict=True)]
    theirs = [[0.0] for _ in jobs]
    for row, (one, at) in enumerate(zip(jobs, places, strict=True)):
        if one.get("ids"):
            ids[row], theirs[row] = one["ids"][at], one["logprobs"][at]
    width = max(map(len, ids))
    index = _on(own, [[*row, *[0] * (width - len(row))] for row in ids])
    given = _on(own, [[*row, *[ABSENT] * (width - len(row))] for row in theirs])
    best = index.gather(1, given.argmax(1)[:, None])[:, 0]
    agree = (own.argmax(1) == best).to(own)
    mine = own.gather(1, index)
    rest = (1 - given.exp().sum(1)).clamp_min(1e-7)
    own_rest = (1 - (mine.exp() * (given > ABSENT)).sum(1)).clamp_min(1e-7)
    kl = (given.exp() * (given - mine)).sum(1) + rest * (rest / own_rest).log()
    compared = _on(own, [bool(one.get("ids")) for one in jobs])
    kl = torch.where(compared, kl.clamp_min(0), torch.zeros_like(kl))
    return torch.stack([target, agree, kl], 1)


def _on(like: Any, numbers: Any) -> Any:
    import torch

    return torch.tensor(numbers, device=like.device)


def _targets(
    like: Any, jobs: Sequence[Mapping[str, Any]], places: Sequence[int]
) -> Any:
    pairs = zip(jobs, places, strict=True)
    return _on(like, [one["tokens"][at] for one, at in pairs])


def processor() -> str:
    """The `Dictator` as SGLang wants it: a string."""
    from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

    return CustomLogitProcessor.to_str.__func__(Dictator)


def job(
    tokens: Sequence[int],
    reference: Reference | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """The `KEY` entry of a request's ``custom_params``.

    Parameters
    ----------
    tokens : sequence of int
        What is to be decoded.
    reference : Reference, optional
        What to compare with.
    out : Path, optional
        Where to write what is noted, see `read`; else nothing is noted.
    """
    entry: dict[str, Any] = {"tokens": list(tokens)}
    if reference is not None:
        entry |= {"ids": reference.ids, "logprobs": reference.logprobs}
    return entry if out is None else {**entry, "out": str(out)}


def likelihood(logprobs: Sequence[float]) -> float:
    """Geometric mean of the probabilities: 1 / perplexity."""
    return math.exp(sum(logprobs) / len(logprobs)) if logprobs else 0.0
