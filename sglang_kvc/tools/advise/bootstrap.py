"""What is kept of the full cache's score, with 95 % intervals.

Prompts are pairs: a rate's score and the full cache's. Both are resampled together
(percentile bootstrap); the draws are the same in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 4000
LEVELS = (2.5, 97.5)


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, from `count` prompts."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.0f} [{self.low:.0f}, {self.high:.0f}]"

    def as_record(self) -> dict[str, float]:
        """For JSON, rounded."""
        return {name: round(value, 3) for name, value in asdict(self).items()}


def retention(scores: Sequence[float], full: Sequence[float]) -> Estimate | None:
    """Mean score as a percentage of the full cache's.

    Parameters
    ----------
    scores, full : one number a prompt, in the same order.

    Returns
    -------
    Estimate or None
        None without prompts or where the full cache scores nothing.
    """
    pairs = np.array([scores, full], float).T
    if not len(pairs) or pairs[:, 1].sum() <= 0:
        return None
    places = np.random.default_rng(0).integers(len(pairs), size=(RESAMPLES, len(pairs)))
    sums = pairs[places].sum(1)
    sums = sums[sums[:, 1] > 0]
    low, high = np.percentile(100 * sums[:, 0] / sums[:, 1], LEVELS)
    value = 100 * pairs[:, 0].sum() / pairs[:, 1].sum()
    return Estimate(float(value), float(low), float(high), len(pairs))
