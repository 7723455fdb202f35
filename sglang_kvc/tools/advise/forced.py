"""How likely a given answer is under a cache that was compressed, asked over HTTP.

Tokens of a prompt are seen before anything is evicted, so the answer has to be decoded.
`Dictator` is a custom logit processor (``--enable-custom-logit-processor``) that makes
each given token the greedy choice. SGLang computes log-probabilities after such
processors; so it also writes what the model itself thought of the token where they show
it: as the logit of a marker, `SHIFT` below which the given token stands. Both come back
as the two most likely tokens, and their difference is the log-probability.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sglang_kvc.tools.advise.server import ServerError

KEY = "advise_tokens"
"""Entry of ``custom_params``; SGLang adds the request as ``__req__``."""
SHIFT = 1.0
"""The given token stays ahead of the marker even if it was certain."""
NEVER = -1e4
"""Logit of all others; finite in half precision."""
BEFORE_EVICTION = 1
"""The first token follows the prompt itself, before anything is evicted."""


class Dictator:
    """Logit processor: SGLang calls it with the logits of the requests that dictate."""

    def __call__(self, logits: Any, params: Sequence[Mapping[str, Any]]) -> Any:
        """Replace the rows of requests whose next token is given."""
        import torch

        from sglang_kvc.upstream.generation import UPSTREAM

        rows, tokens = [], []
        for row, param in enumerate(params):
            req, given = param["__req__"], param[KEY]
            # Counts in launch order, so neither overlap nor retraction, nor the
            # samples of a prompt's middle chunks put it out of step.
            at = UPSTREAM.committed_len(req) - len(req.origin_input_ids)
            if 0 <= at < len(given):
                rows.append(row)
                tokens.append(given[at])
        if rows:
            index = torch.tensor(rows, device=logits.device)
            target = torch.tensor(tokens, device=logits.device)
            thought = logits[index].float().log_softmax(-1)
            thought = thought.gather(1, target[:, None])[:, 0].clamp(NEVER / 2, 0)
            logits[index] = NEVER
            logits[index, (target + 1) % logits.shape[1]] = thought.to(logits.dtype)
            logits[index, target] = SHIFT
        return logits


def processor() -> str:
    """The `Dictator` as SGLang wants it: a string."""
    from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

    said: str = CustomLogitProcessor.to_str.__func__(Dictator)
    return said


def fields(said: str) -> dict[str, Any]:
    """Fields of a ``/generate`` request that dictates; `said` is what `processor` says.

    The tokens go into its ``custom_params``, as `KEY`.
    """
    return {
        "custom_logit_processor": said,
        "return_logprob": True,
        "top_logprobs_num": 2,
    }


def logprobs_of(output: Mapping[str, Any], tokens: Sequence[int]) -> list[float]:
    """Log-probability of each token that was dictated.

    Raises
    ------
    ServerError
        If the server has decoded other tokens.
    """
    if list(output["output_ids"]) != list(tokens):
        raise ServerError("the server did not follow the dictation")
    found = []
    tops = output["meta_info"]["output_top_logprobs"]
    for top, token in zip(tops, tokens, strict=True):
        (own, first, *_), (marker, *_) = top[:2]
        if first != token:
            raise ServerError("the server did not follow the dictation")
        found.append(min(marker - own + SHIFT, 0.0))
    return found


def until_difference(output: Mapping[str, Any], tokens: Sequence[int]) -> list[float]:
    """What a free answer says about the given one: up to the first other token.

    As long as both are equal, the free answer has decoded the given one. At the first
    difference the most likely tokens tell what the given one would have had; if it is
    not among them, it had at most what the last of them has.

    Parameters
    ----------
    output : of a request with ``return_logprob`` and ``top_logprobs_num``.
    tokens : the given answer.
    """
    meta = output["meta_info"]
    found = []
    own, tops = meta["output_token_logprobs"], meta["output_top_logprobs"]
    for (logprob, token, *_), top, given in zip(own, tops, tokens, strict=False):
        if token == given:
            found.append(logprob)
            continue
        listed = {entry[1]: entry[0] for entry in top}
        found.append(listed.get(given, min(listed.values(), default=logprob)))
        break
    return found
