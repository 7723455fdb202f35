"""Text to hide things in, cut so that the prompt has its length."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from bench.quality.tasks.fit import largest_fitting
from bench.quality.tasks.sample import Draw, Sample, encode

NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. "
    "There and back again."
)
ESSAY_WORDS = 24_000
"""Words of a passage: more than any prompt holds."""

Make = Callable[[int], Sample]


def fitted(draw: Draw, make: Make, limit: int, margin: int = 0) -> Sample:
    """The sample with as many units of filler as the length of `draw` allows.

    Parameters
    ----------
    make : callable
        Builds the sample with so many units; it must not draw random numbers that
        depend on earlier calls.
    limit : int
        Most units there are.
    margin : int
        Tokens to leave free.
    """

    def size(units: int) -> int:
        return len(encode(draw.tokenizer, make(units))) + margin

    return make(largest_fitting(size, draw.length, limit))


def essay_passage(draw: Draw) -> list[str]:
    """Consecutive words of the essays, from a place that depends on the sample."""
    words = draw.corpus.essay_half(draw.seed)
    start = draw.rng("essay").randrange(max(1, len(words) - ESSAY_WORDS))
    return words[start : start + ESSAY_WORDS]


def noise_units(count: int) -> list[str]:
    """The same sentences over and over."""
    return [NOISE] * count


def scatter(
    units: Sequence[str], needles: Sequence[str], rng: random.Random, joint: str = " "
) -> str:
    """Needles between the units, in their order, at random depths.

    The depths are the same fractions whatever the number of units.
    """
    depths = sorted(rng.random() for _ in needles)
    parts: list[str] = []
    begin = 0
    for depth, needle in zip(depths, needles, strict=True):
        end = int(depth * (len(units) + 1))
        parts += [*units[begin:end], needle]
        begin = end
    return joint.join([*parts, *units[begin:]])
