"""One sentence: which rate, and how sure that is.

The rule: the highest rate whose interval allows no loss beyond the tolerance. It needs
`MIN_PROMPTS`, because an interval of a handful of prompts is too narrow, and something
that was evicted.
"""

from __future__ import annotations

from collections.abc import Sequence

from sglang_kvc.tools.advise.asking import FULL
from sglang_kvc.tools.advise.bootstrap import Estimate
from sglang_kvc.tools.advise.summary import Row

MIN_PROMPTS = 10
TOLERANCE = 5.0
"""Percent of the full cache's score."""
_SAME = 1.05
"""Rates that hold so little less than a lower one are the same in practice."""


def advise(rows: Sequence[Row], score: str, tolerance: float = TOLERANCE) -> str:
    """The advice.

    Parameters
    ----------
    rows : one for each rate, the full cache's among them.
    score : which score counts.
    tolerance : most that may be lost, in percent of the full cache's score.
    """
    rated = sorted((r for r in rows if r.rate != FULL), key=lambda row: row.rate)
    if not rated:
        return "Only the full cache was asked. Give --rates above 1."
    if all(row.resident > row.logical / _SAME for row in rated):
        return (
            "Cannot tell: nothing was evicted. The prompts are shorter than what a "
            "request keeps at least (--kv-compress-min-budget, 512 by default)."
        )
    kept = {row.rate: row.kept[score] for row in rated}
    known = {rate: it for rate, it in kept.items() if it is not None}
    if len(known) < len(kept):
        return (
            f"Cannot tell: the full cache itself scores 0 ({_words(score)}). Check the "
            "references, or choose another --score."
        )
    count = next(iter(known.values())).count
    if count < MIN_PROMPTS:
        return (
            f"Cannot tell from {count} prompts; send {MIN_PROMPTS} or more, better 100."
        )
    good = [rate for rate, it in known.items() if it.low >= 100 - tolerance]
    if good:
        return _recommend(rated, known, max(good), score)
    return _none(known, score, tolerance)


def _recommend(
    rows: Sequence[Row], known: dict[float, Estimate], best: float, score: str
) -> str:
    it = known[best]
    text = (
        f"Rate {best:g} keeps {it.value:.0f} % [{it.low:.0f}, {it.high:.0f}] of the "
        f"full cache's score ({_words(score)}) on these {it.count} prompts"
    )
    above = [rate for rate in known if rate > best]
    if above:
        text += f"; rate {min(above):g} {_change(known[min(above)])}"
    text += f". Advice: {best:g}."
    lower = [row for row in rows if row.rate < best]
    own = next(row for row in rows if row.rate == best)
    same = [row.rate for row in lower if row.resident <= own.resident * _SAME]
    if same:
        text += (
            f" It keeps as many tokens as rate {min(same):g} here: the least that a "
            "request keeps (--kv-compress-min-budget) bounds both."
        )
    return text


def _none(known: dict[float, Estimate], score: str, tolerance: float) -> str:
    least = min(known)
    it = known[least]
    text = (
        f"Rate {least:g} keeps {it.value:.0f} % [{it.low:.0f}, {it.high:.0f}] of the "
        f"full cache's score ({_words(score)}) on these {it.count} prompts"
    )
    if it.high < 100 - tolerance:
        return f"{text}, more than {tolerance:g} % are lost. Advice: do not compress."
    return (
        f"{text}. Cannot tell: the interval allows a loss of more than {tolerance:g} "
        "%. Send more prompts, or accept more with --tolerance."
    )


def _change(it: Estimate) -> str:
    if it.value > 100:
        return (
            f"gains {it.value - 100:.0f} points [{it.low - 100:.0f}, "
            f"{it.high - 100:.0f}]"
        )
    return (
        f"loses {100 - it.value:.0f} points [{100 - it.high:.0f}, {100 - it.low:.0f}]"
    )


def _words(score: str) -> str:
    return score.replace("_", "-")
