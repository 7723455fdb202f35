"""The comparison with kvpress' SnapKV: scores, ties and what is counted.

kvpress itself is not in the test environment.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from bench.quality.scouts.snapkv_check import (
    Comparison,
    compare,
    compare_head,
    cut,
    main,
)
from bench.quality.scouts.snapkv_press import pooled_squares, window_attention

KEYS, WINDOW, HEADS, GROUP, DIM = 20, 4, 2, 3, 8


def test_window_attention_is_causal_attention() -> None:
    torch.manual_seed(0)
    queries = torch.randn(HEADS * GROUP, KEYS, DIM)
    keys = torch.randn(HEADS, KEYS, DIM)
    logits = queries @ keys.repeat_interleave(GROUP, 0).transpose(1, 2)
    masked = logits / math.sqrt(DIM) + torch.full((KEYS, KEYS), -math.inf).triu(1)
    found = window_attention(queries[:, -WINDOW:], keys)
    torch.testing.assert_close(found, masked.softmax(-1)[:, -WINDOW:])


def test_scores_are_pooled_sums_of_squares() -> None:
    torch.manual_seed(0)
    attention = torch.rand(HEADS * GROUP, WINDOW, KEYS)
    scores = pooled_squares(attention, HEADS, 3, WINDOW)
    for head in range(HEADS):
        rows = attention[head * GROUP : (head + 1) * GROUP]
        mass = [float((rows[..., key] ** 2).sum()) for key in range(KEYS)]
        for key in range(KEYS - WINDOW):
            # The last of them looks into the window.
            near = max(mass[max(key - 1, 0) : key + 2])
            assert float(scores[head, key]) == pytest.approx(near, rel=1e-6)
    assert scores[:, -WINDOW:].isinf().all()


def test_of_equal_scores_the_oldest_go_first() -> None:
    assert cut(np.array([3.0, 1, 1, 1, 2]), 3) == {0, 3, 4}
    assert cut(np.array([1.0, 1, 1, np.inf]), 2) == {2, 3}


def head(own: set[int], kept: set[int], scores: list[float]) -> Comparison:
    total = Comparison()
    compare_head(total, {"layer": 5}, own, kept, np.array(scores))
    return total


def test_exact_ties_are_no_difference() -> None:
    same = head({0, 3}, {0, 3}, [5, 1, 1, 1])
    assert (same.differ, same.differ_topk, same.equal_heads) == (0, 0, 1)
    # kvpress' top-k took another of the equal ones.
    tie = head({0, 3}, {0, 1}, [5, 1, 1, 1])
    assert (tie.differ, tie.differ_topk, tie.exact_ties) == (0, 1, 2)
    assert (tie.equal_heads, tie.unexplained, tie.near_ties) == (1, 0, [])


def test_near_ties_are_listed_and_others_counted() -> None:
    near = head({0, 1}, {0, 2}, [5, 1, 1.00001, 0.5])
    assert (near.differ, near.equal_heads, near.unexplained) == (1, 0, 0)
    assert near.exact_ties == 1  # position 2 is the cut itself
    assert [(n["position"], n["kept_by"]) for n in near.near_ties] == [
        (1, "ours"),
        (2, "kvpress"),
    ]
    assert near.near_ties[0]["gap"] == pytest.approx(1e-5, rel=1e-3)
    assert near.near_ties[0]["layer"] == 5
    wrong = head({0, 3}, {0, 2}, [5, 1, 1.00001, 0.5])
    assert wrong.unexplained == 1


def test_all_heads_are_counted() -> None:
    scores = np.tile(np.arange(8.0), (2, 4, 1))
    kept = np.tile(np.array([6, 7]), (2, 4, 1))
    stock = np.tile(np.array([0, 7]), (2, 4, 1))
    theirs: dict[str, Any] = {
        "ours_kept": kept,
        "ours_scores": scores,
        "snapkv_kept": stock,
    }
    total = compare(kept.tolist(), theirs, kv_heads=2)
    assert (total.kept, total.heads, total.equal_heads) == (16, 8, 8)
    assert (total.differ, total.differ_topk, total.differ_stock) == (0, 0, 8)
    ours = kept.tolist()
    ours[1][3] = [0, 7]
    total = compare(ours, theirs, kv_heads=2)
    assert total.unexplained == 2 - 1  # position 6 is the cut
    where = {key: total.near_ties[0][key] for key in ("prompt", "layer", "head")}
    assert where == {"prompt": 1, "layer": 1, "head": 1}


@pytest.mark.parametrize("words", [["--budget", "100"], ["--budget", "32"]])
def test_whole_pages_beyond_the_window(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="--budget"):
        main(["--model", "m", "--kvpress", "k", *words])
