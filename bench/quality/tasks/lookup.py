"""Key-value retrieval: every line looks alike, so nothing can be thrown away."""

from __future__ import annotations

import json

from bench.quality.tasks.corpus import half
from bench.quality.tasks.filler import fitted
from bench.quality.tasks.sample import Draw, Sample
from bench.quality.tasks.words import random_uuid

MADE_UP = 600
"""Further pairs, for prompts longer than the file's 75."""


def retrieval(draw: Draw) -> Sample:
    """The value of a key in one JSON object of uuids."""
    cases = half(draw.corpus.kv_cases, draw.seed)
    case = cases[draw.index % len(cases)]
    pairs = [tuple(pair) for pair in case["ordered_kv_records"]]
    gold = next(pair for pair in pairs if pair[0] == case["key"])
    rng = draw.rng("pairs")
    others = [pair for pair in pairs if pair != gold]
    rng.shuffle(others)
    others += [(random_uuid(rng), random_uuid(rng)) for _ in range(MADE_UP)]
    depth = rng.random()
    question = f'Key: "{case["key"]}"\nWhat is its value in the JSON object above?'
    intro = "Find the value of the key that is asked for in this JSON object."

    def make(units: int) -> Sample:
        shown = others[:units]
        shown.insert(int(depth * (units + 1)), gold)
        # One pair a line, as the file's authors print them.
        rows = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in shown]
        text = "{" + ",\n".join(rows)[1:] + "}"
        return draw.sample(
            prompt=f"{intro}\n\n{text}\n\n{question}",
            answers=(case["value"],),
            max_new_tokens=48,
            scorer="found",
            question=question,
            prefix="Its value is:",
        )

    return fitted(draw, make, len(others))
