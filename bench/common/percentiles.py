"""Percentiles of latencies."""

from __future__ import annotations

from collections.abc import Iterable


def percentile(values: Iterable[float], share: float) -> float | None:
    """The value that `share` of them do not exceed, interpolated; None without any.

    Parameters
    ----------
    values : iterable of float
    share : float
        From 0 to 1.
    """
    ordered = sorted(values)
    if not ordered:
        return None
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
