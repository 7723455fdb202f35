"""Numbers of the soak's load, and what its requests are drawn from."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

RATES = (1, 1.01, 1.5, 2, 4, 8, 64)
BUDGETS = (64, 128, 256, 512, 1024, 4096)
DOCUMENTS = 8
HOSTILE_SHARE = 0.12
STRUCTURED_SHARE = 0.04
BEYOND_SHARE = 0.005
WORDS = (
    "the a of and to in is was for on that with as it at by from his her an be are "
    "this which or had not have one two when who all other time first new more some "
    "said day house water light field small great under over river stone green letter"
)
SCHEMA = {
    "type": "object",
    "properties": {"number": {"type": "integer"}, "good": {"type": "boolean"}},
    "required": ["number", "good"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Shape:
    """Numbers of the load, from the command line."""

    requests: int
    max_len: int
    max_output: int
    aborts: int
    leaves: int
    seed: int = 0
    without: frozenset[str] = frozenset()
    stock: bool = False
    """The server knows no options of ours: nothing that needs them is sent."""


def log_uniform(rng: random.Random, low: int, high: int) -> int:
    """An integer from `low` to `high`, as often below as above their geometric mean."""
    drawn = math.exp(rng.uniform(math.log(low), math.log(high + 1)))
    return min(max(int(drawn), low), high)
