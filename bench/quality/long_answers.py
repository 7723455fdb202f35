"""What can be said of a long answer beside its score.

``chrf`` (arXiv W15-3049: n-grams of 1 to 6 characters without blanks, recall counts
twice; the best of several references), ``names`` and ``numbers`` (those of the
references that stand in the prompt, too: which share has the answer?), ``supported``
(which share of the answer's own stands in the prompt?), ``distinct4`` (different ones
among its runs of four words: below the full cache's where it repeats itself).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

CHRF_ORDERS, BETA = range(1, 7), 2.0
RUN = 4
FIGURES = ("chrf", "names", "numbers", "supported", "distinct4")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_WORD = re.compile(r"[^\W\d_][\w'’-]*")
# Behind a word or a comma, so no sentence begins with it.
_INSIDE = re.compile(r"(?<=[\w,;] )[A-Z][\w'’-]+")


def figures(
    text: str, references: Sequence[str], prompt: str
) -> dict[str, float | None]:
    """All figures of an answer; None where there is nothing to be found.

    Parameters
    ----------
    text : str
        The answer.
    references : sequence of str
        What a good one says.
    prompt : str
        What was read, the question included.
    """
    known = names_of(prompt)
    numbers = set(NUMBER.findall(prompt))
    wanted = " ".join(references)
    said_names, said_numbers = _words(text) & known, set(NUMBER.findall(text))
    own = names_of(text) | said_numbers
    return {
        "chrf": max((chrf(text, one) for one in references), default=None),
        "names": _share(_words(wanted) & known, said_names),
        "numbers": _share(set(NUMBER.findall(wanted)) & numbers, said_numbers),
        "supported": _share(own, _words(prompt) | numbers),
        "distinct4": distinct(text),
    }


def names_of(text: str) -> set[str]:
    """Words with a capital inside of sentences that are never written without one."""
    return set(_INSIDE.findall(text)) - {w.capitalize() for w in _lower(text)}


def _lower(text: str) -> set[str]:
    return {word for word in _words(text) if word[0].islower()}


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text))


def _share(wanted: set[str], found: set[str]) -> float | None:
    return len(wanted & found) / len(wanted) if wanted else None


def chrf(text: str, reference: str) -> float:
    """Character n-gram F-score of one reference, in [0, 1].

    Orders for which one side is too short are left out.
    """
    given, gold = ("".join(one.split()) for one in (text, reference))
    precisions, recalls = [], []
    for n in CHRF_ORDERS:
        ours, theirs = (_ngrams(one, n) for one in (given, gold))
        if not ours or not theirs:
            break
        common = (ours & theirs).total()
        precisions.append(common / ours.total())
        recalls.append(common / theirs.total())
    precision, recall = sum(precisions), sum(recalls)
    if not precision or not recall:
        return 0.0
    mean = (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)
    return mean / len(precisions)


def _ngrams(text: str, n: int) -> Counter[str]:
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))


def distinct(text: str) -> float | None:
    """Different runs of `RUN` words over all; None of fewer words."""
    words = text.lower().split()
    runs = [tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)]
    return len(set(runs)) / len(runs) if runs else None
