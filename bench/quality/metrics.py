"""Scores in [0, 1] of an answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from bench.quality.math_answers import math_answer, numbered
from sglang_kvc.tools.advise.scores import contains, normalize, rouge_l

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")

Scorer = Callable[[str, Sequence[str]], float]


def found(text: str, answers: Sequence[str]) -> float:
    """Fraction of the answers that occur, ignoring case."""
    lower = text.lower()
    return sum(answer.lower() in lower for answer in answers) / len(answers)


def starts(text: str, answers: Sequence[str]) -> float:
    """1 if the text begins with one of the answers, after normalisation."""
    words = normalize(text) + " "
    return float(any(words.startswith(normalize(a) + " ") for a in answers))


def last_number(text: str, answers: Sequence[str]) -> float:
    """1 if the last number of the text is the answer's."""
    numbers = NUMBER.findall(text)
    if not numbers:
        return 0.0
    last = float(numbers[-1].replace(",", ""))
    return float(any(abs(last - float(answer)) < 1e-6 for answer in answers))


def listed(text: str, answers: Sequence[str]) -> float:
    """F1 of the lines of a list, whatever marks or numbers stand before each."""
    lines = (re.sub(r"^[\s\-*•]*(?:\d+[.)])?[\s`*]*", "", x) for x in text.splitlines())
    given = {line.rstrip("`*.,:() ").lower() for line in lines} - {""}
    gold = {answer.lower() for answer in answers}
    return 2 * len(given & gold) / (len(given) + len(gold))


def boxed(text: str, answers: Sequence[str]) -> float:
    r"""1 if the content of the last ``\boxed{}`` is the answer, up to spelling."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return 0.0
    begin = at = start + len("\\boxed{")
    depth = 1
    while at < len(text) and depth:
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        at += 1
    given = _plain_tex(text[begin : at - 1] if depth == 0 else text[begin:])
    return float(any(given == _plain_tex(answer) for answer in answers))


def _plain_tex(text: str) -> str:
    text = re.sub(r"\\left|\\right|\\!|\\,|\$|\s", "", text)
    return text.removesuffix(".")


SCORERS: dict[str, Scorer] = {
    "found": found,
    "any": contains,
    "starts": starts,
    "last_number": last_number,
    "boxed": boxed,
    "math": math_answer,
    "numbered": numbered,
    "listed": listed,
    "rouge_l": rouge_l,
}
LIKELIHOOD = "likelihood"
"""Scored from log-probabilities, not from a text."""
