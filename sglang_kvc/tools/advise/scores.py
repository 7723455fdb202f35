"""Scores in [0, 1] of one answer."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
SHORT_WORDS = 6
"""References of at most so many words are looked for; longer ones are compared."""

Scorer = Callable[[str, Sequence[str]], float]


def normalize(text: str) -> str:
    """Lower case without punctuation, articles and superfluous blanks (SQuAD's)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", text).split())


def contains(text: str, references: Sequence[str]) -> float:
    """1 if one of the references occurs as whole words, after normalisation."""
    words = f" {normalize(text)} "
    return float(any(f" {normalize(one)} " in words for one in references))


def exact(text: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references, after normalisation."""
    return float(any(normalize(text) == normalize(one) for one in references))


def rouge_l(text: str, references: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words; the best of the references."""
    found = (_rouge(normalize(text), normalize(one)) for one in references)
    return max(found, default=0.0)


def _rouge(given: str, gold: str) -> float:
    a, b = given.split(), gold.split()
    if not a or not b:
        return 0.0
    row = [0] * (len(b) + 1)
    for word in a:
        left = 0
        for j, other in enumerate(b, 1):
            above = row[j]
            row[j] = left + 1 if word == other else max(above, row[j - 1])
            left = above
    common = row[-1]
    return 2 * common / (len(a) + len(b))


REFERENCE_SCORERS: dict[str, Scorer] = {
    "contains": contains,
    "exact": exact,
    "rouge_l": rouge_l,
}


def likelihood(logprobs: Sequence[float]) -> float:
    """Geometric mean of the probabilities: 1 / perplexity; 1 of no token at all."""
    return math.exp(sum(logprobs) / len(logprobs)) if logprobs else 1.0


def leading(tokens: Sequence[int], full: Sequence[int]) -> float:
    """Share of the full cache's tokens that stand equal at the start of an answer."""
    if not full:
        return float(not tokens)
    pairs = enumerate(zip(tokens, full, strict=False))
    most = min(len(tokens), len(full))
    return next((i for i, (a, b) in pairs if a != b), most) / len(full)
