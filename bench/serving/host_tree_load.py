"""The load of `host_tree`: so many running, so many waiting, step after step.

Groups of requests share a long prefix. Whenever one is admitted another one arrives, so
the queue stays as long as it is. The first requests end one after the other, so that
later ones do, too: every few steps a request ends, its pages are freed, and the next
one is matched and prefilled.
"""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

VOCAB = 32000
FIRST_ID = 10
"""Below are ids that could end a request."""


@dataclass(frozen=True)
class Shape:
    """What the requests look like, in tokens.

    Attributes
    ----------
    running : most requests of a batch.
    groups : how many different prefixes there are.
    shared, own, output : of a prompt the part that its group shares, the part that is
        its own, and the answer.
    pool : size of the KV pool.
    page : tokens of a page.
    """

    running: int = 128
    groups: int = 8
    shared: int = 6000
    own: int = 500
    output: int = 500
    pool: int = 880_000
    page: int = 16

    @property
    def context(self) -> int:
        """Longest request, and what SGLang reserves beside it."""
        return self.shared + self.own + self.output + 64

    @property
    def filling_steps(self) -> int:
        """Steps until the pool is full of prefixes that nobody uses any more."""
        kept = self.own + self.output
        ended = max(0, self.pool - self.groups * self.shared) // kept
        # One request ends every `output / running` steps; a prefill step each beside.
        return int(ended * (self.output / self.running + 1)) + 2 * self.running


@dataclass(frozen=True)
class Arrival:
    """One request."""

    rid: str
    ids: array[int]
    output: int


def arrivals(shape: Shape, seed: int = 0) -> Iterator[Arrival]:
    """Requests without end; the same ones for the same shape and seed."""
    draw = random.Random(seed)

    def tokens(number: int) -> array[int]:
        return array("q", draw.choices(range(FIRST_ID, VOCAB), k=number))

    prefixes = [tokens(shape.shared) for _ in range(shape.groups)]
    for number in itertools.count():
        part = min(1.0, (number + 1) / shape.running)
        yield Arrival(
            rid=f"r{number}",
            ids=prefixes[number % shape.groups] + tokens(shape.own),
            output=max(2, int(shape.output * part)),
        )


def message(arrival: Arrival, rate: float | None) -> Any:
    """What SGLang's tokenizer would send to the scheduler."""
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    params = SamplingParams(
        temperature=0.0,
        max_new_tokens=arrival.output,
        ignore_eos=True,
        custom_params=None if rate is None else {"kv_compress": {"rate": rate}},
    )
    params.normalize(None)
    return TokenizedGenerateReqInput(
        rid=arrival.rid,
        input_text=None,
        input_ids=arrival.ids,
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=params,
        return_logprob=False,
        logprob_start_len=-1,
        top_logprobs_num=0,
        token_ids_logprob=None,
        stream=False,
    )
