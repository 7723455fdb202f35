"""What a server keeps and the oracle does not, and whether a near-tie explains it."""

from __future__ import annotations

from tests.engine.oracle.choice import BLOCK, Choice

TIE = 1e-3
"""fp32 sums in another order: scores agree to about 1e-5 relative."""
MAX_DIFFERING = 0.002
"""Share of kept KVs that near-ties may decide."""


def check_few_differ(differing: int, total: int) -> None:
    """Raise if more of the kept KVs differ than near-ties explain."""
    few = differing <= MAX_DIFFERING * total
    assert few, f"{differing} of {total} kept KVs differ"


def count_differences(choice: Choice, kept: list[list[int]]) -> int:
    """Positions that one of both keeps, over all heads."""
    pairs = zip(choice.kept, kept, strict=True)
    return sum(len(set(want) ^ set(own)) for want, own in pairs)


def explain_differences(choice: Choice, kept: list[list[int]], tie: float) -> list[str]:
    """Differences between served and oracle kept sets that are not near-ties.

    A head may keep another number of blocks only if the price of every block in
    dispute is within `tie` (relative) of the threshold; at its own number of blocks,
    positions may differ only if their scores are within `tie` of the cut. With a `tie`
    of 0 nothing may differ.
    """
    problems = []
    for h, own in enumerate(kept):
        if own == choice.kept[h]:
            continue
        if tie:
            problems += _disputed_blocks(choice, h, own, tie)
            problems += _disputed_positions(choice, h, own, tie)
        else:
            disputed = sorted(set(own) ^ set(choice.kept[h]))[:8]
            problems.append(f"head {h}: kept {disputed}, ... by one side only")
    return problems


def _disputed_blocks(choice: Choice, h: int, own: list[int], tie: float) -> list[str]:
    low, high = sorted((_evicted_blocks(choice, h, own), choice.evicted_blocks[h]))
    threshold = choice.thresholds[h]
    return [
        f"head {h}: block {k} costs {price:.3e}, threshold {threshold:.3e}"
        for k, price in enumerate(choice.prices[h][low:high], low)
        if not _near(price, threshold, tie)
    ]


def _disputed_positions(
    choice: Choice, h: int, own: list[int], tie: float
) -> list[str]:
    cut = BLOCK * _evicted_blocks(choice, h, own)
    score, ranked = choice.scores[h].tolist(), choice.ranked[h]
    edge = score[ranked[cut - 1]] if cut else 0.0
    return [
        f"head {h}: position {p} scores {score[p]:.3e}, cut {edge:.3e}"
        for p in set(ranked[cut:]) ^ set(own)
        if not _near(score[p], edge, tie)
    ]


def _evicted_blocks(choice: Choice, h: int, own: list[int]) -> int:
    return (len(choice.competing[h]) - len(own)) // BLOCK


def _near(a: float, b: float, tie: float) -> bool:
    scale = max(abs(a), abs(b), 1e-12)
    # What must stay (inf) is near nothing.
    return scale < float("inf") and abs(a - b) <= tie * scale
