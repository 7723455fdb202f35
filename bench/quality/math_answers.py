r"""Whether the end of a long chain of thought is right, up to the way it is written.

The last ``\boxed{}`` counts, else the last number. Both sides are normalised: TeX that
only sets type is dropped, ``\frac{a}{b}`` and ``a/b`` are one, and what is a number is
compared as one. Equal forms that this does not see are wrong for every system alike.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_BOX = "\\boxed{"
_DROPPED = re.compile(
    r"\\(?:left|right|displaystyle|limits)(?![a-zA-Z])|\\[!,;: ]|\^\{?\\circ\}?"
    r"|\\(?:%|\$)|[%$~\s]"
)
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf)\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_SHORT_FRACTION = re.compile(r"\\[dt]?frac(\d)(\d)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_NAMED = re.compile(r"^[a-zA-Z]=(?=.)")


def math_answer(text: str, answers: Sequence[str]) -> float:
    """1 if the answer in the last box, or the last number, is one of `answers`."""
    given = last_box(text)
    if given is None:
        numbers = NUMBER.findall(text)
        given = numbers[-1] if numbers else ""
    return float(any(is_equal(given, answer) for answer in answers))


def numbered(text: str, answers: Sequence[str]) -> float:
    """Share of problems whose ``Answer k: number`` is right; the last one counts."""
    right = 0
    for k, answer in enumerate(answers, 1):
        pattern = rf"answer\W{{0,3}}{k}\b\W*?({NUMBER.pattern})"
        found = re.findall(pattern, text, flags=re.IGNORECASE)
        right += bool(found) and is_equal(found[-1], answer)
    return right / len(answers)


def last_box(text: str) -> str | None:
    r"""Content of the last ``\boxed{}``, which may be unfinished; None without one."""
    start = text.rfind(_BOX)
    if start < 0:
        return None
    begin = at = start + len(_BOX)
    depth = 1
    while at < len(text) and depth:
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        at += 1
    return text[begin : at - 1] if depth == 0 else text[begin:]


def is_equal(given: str, answer: str) -> bool:
    """Whether two answers are one, after normalisation."""
    a, b = plain(given), plain(answer)
    if a == b:
        return bool(a)
    x, y = _number(a), _number(b)
    return x is not None and x == y


def plain(text: str) -> str:
    """An answer without what only sets type."""
    text = _TEXT.sub(r"\1", text)
    text = _SHORT_FRACTION.sub(r"\1/\2", text)
    text = _FRACTION.sub(_over, text)
    text = _THOUSANDS.sub("", _DROPPED.sub("", text))
    return _NAMED.sub("", text).rstrip(".").lower()


def _over(found: re.Match[str]) -> str:
    parts = (p if len(p) <= 1 or p.isdigit() else f"({p})" for p in found.groups())
    return "/".join(parts)


def _number(text: str) -> Fraction | None:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None
