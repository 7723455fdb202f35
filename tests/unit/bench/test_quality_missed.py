"""`missed`: what of an answer's attention falls on evicted tokens."""

import pytest
import torch

from bench.quality.scouts.missed import Answer, Watcher, shares, table, values_missed
from bench.quality.scouts.simulate_choice import SINKS

N = 40


def test_shares_leave_sinks_out_and_say_where() -> None:
    paid = torch.zeros(2, N)
    paid[:, 0] = 0.9  # a sink
    paid[0, 10], paid[0, 39] = 0.3, 0.1
    paid[1, 10] = 0.2
    stays = torch.ones(2, N, dtype=torch.bool)
    stays[0, 39] = stays[1, 10] = stays[:, 0] = False
    found = shares(paid, stays)
    assert found["heads"] == [0.25, 1.0]
    assert found["missed"] == pytest.approx(0.625)
    # Tenths hold four tokens each: 10 is in the third, 39 in the last.
    assert found["tenths"] == [0, 0, 0.8, 0, 0, 0, 0, 0, 0, 0.2]


def test_values_count_over_all_heads() -> None:
    paid, norms = torch.zeros(2, N), torch.ones(2, N)
    paid[0, 10], paid[1, 10] = 0.5, 0.5
    norms[1, 10] = 3.0
    stays = torch.ones(2, N, dtype=torch.bool)
    stays[1, 10] = False
    assert values_missed(Answer(paid, norms, 1), stays) == 0.75
    stays[:, :SINKS] = False
    assert values_missed(Answer(paid, norms, 1), stays) == 0.75


def test_watcher_adds_queries_and_leaves_decoded_tokens_out() -> None:
    watcher = Watcher()
    watcher.watch(prompt=3, layers=1)
    # [batch, H, G, new, n]: two heads of a group, the last token was decoded.
    step = torch.tensor([[0.5, 0.1, 0.0, 0.4], [0.1, 0.1, 0.0, 0.8]])
    for _ in range(2):
        watcher.decoded(0, step.view(1, 1, 2, 1, 4))
    torch.testing.assert_close(watcher.paid[0], torch.tensor([[0.6, 0.2, 0.0]]))


def test_table_has_a_row_a_task_and_rate() -> None:
    line = {
        "task": "a",
        "rate": 4.0,
        "missed": 0.5,
        "possible": 0.25,
        "values": 0.4,
        "possible_values": 0.2,
        "tenths": [1.0] + [0.0] * 9,
        "heads": [0.0, 0.2, 0.8, 1.0],
        "candidates": {"plain": {"values": 0.4, "missed": 0.5}},
    }
    rows = table([line, line], layers=2).splitlines()
    assert rows[2] == "| a | 4 | 50.0 | 25.0 | 40.0 | 20.0 | 100.0 | 1: 90, 0: 10 |"
    assert rows[-5] == "| plain | 40.0 |"
    assert rows[-1] == "| plain | 50.0 |"
