"""bench.serving.host_tree: its load, its clock, its table, and once in miniature."""

from __future__ import annotations

import io
import itertools
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.serving import host_tree
from bench.serving.host_tree import STOCK, parse_arguments, summarize
from bench.serving.host_tree_child import Feed
from bench.serving.host_tree_load import FIRST_ID, Shape, arrivals
from sglang_kvc.upstream.generation import UPSTREAM

SMALL = Shape(running=4, groups=2, shared=32, own=16, output=8, pool=512)


def first(number: int) -> list[Any]:
    return list(itertools.islice(arrivals(SMALL), number))


def answer(step: float, *, traced: bool = False, tree: float = 0.0) -> dict[str, Any]:
    """A block of one prefill step and three decode steps of `step` seconds."""
    return {
        "prefill": [step],
        "decode": [step] * 3,
        "running": 4,
        "waiting": 6,
        "free": 0,
        "evictable": 100,
        "traced": traced,
        "spent": {"match_prefix": tree, "evict": 0.0},
        "calls": {"match_prefix": 2, "evict": 0},
    }


def test_groups_share_a_prefix_and_nothing_else() -> None:
    one, other, again = (a.ids for a in first(3))
    assert one[:32] == again[:32] != other[:32]
    assert one[32:] != again[32:]
    assert len(one) == 48 and min(one) >= FIRST_ID


def test_the_first_requests_end_one_after_the_other() -> None:
    assert [a.output for a in first(6)] == [2, 4, 6, 8, 8, 8]


def test_every_system_gets_the_same_requests() -> None:
    assert [a.ids for a in first(5)] == [a.ids for a in first(5)]


def test_a_block_is_compared_with_the_stock_block_of_its_round() -> None:
    """The machine becomes three times as slow; the ratio does not see it."""
    rounds = [1e-3, 1e-3, 3e-3]
    rows = summarize(
        {
            STOCK: [answer(step) for step in rounds],
            "ours-rate-1": [answer(step * 1.5) for step in rounds],
        }
    )
    assert rows[1]["over_stock"] == pytest.approx(1.5)
    assert rows[1]["over_stock_quartiles"] == pytest.approx([1.5, 1.5])
    assert rows[1]["step_ms"] == pytest.approx(1.5)
    assert rows[1]["prefill_steps"] == 3 and rows[1]["decode_steps"] == 9


def test_traced_blocks_say_what_the_tree_takes_and_no_step_time() -> None:
    (row,) = summarize({STOCK: [answer(1e-3), answer(9.0, traced=True, tree=8e-6)]})
    assert row["step_ms"] == pytest.approx(1.0)
    assert row["tree_ms"] == pytest.approx(0.002)
    assert row["tree_us_by_call"] == {"match_prefix": pytest.approx(4.0)}
    assert row["tree_calls_a_step"] == {"match_prefix": 0.5}


def test_arguments_need_stock_and_known_systems() -> None:
    assert parse_arguments(["--systems", "ours-rate-4,stock"]).systems[0] != STOCK
    for words in ("ours-rate-4", "stock,unheard-of"):
        with pytest.raises(SystemExit):
            parse_arguments(["--systems", words])


class Tree:
    """Nested calls, as SGLang's: a checkpoint inserts."""

    match_prefix = touch_prefix = lock = unlock = on_release = lambda self: None
    free_kv_row = evict = evict_for_alloc = match_prefix

    def checkpoint(self) -> None:
        self.insert()

    def insert(self) -> None:
        time.sleep(0)

    def evictable_size(self) -> int:
        return 7


class Policy:
    policy: Any = None

    def _validate_and_adjust_policy(self, name: str, tree: Any) -> str:
        del tree
        return name


def fed(monkeypatch: pytest.MonkeyPatch, *commands: dict[str, Any]) -> Any:
    """A Feed of a scheduler that is not there, with `commands` to read."""
    lines = "".join(json.dumps(command) + "\n" for command in commands)
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    scheduler = SimpleNamespace(
        waiting_queue=[],
        running_batch=SimpleNamespace(reqs=[None]),
        last_batch=None,
        tree_cache=Tree(),
        policy=Policy(),
        token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: 3),
        gracefully_exit=False,
    )
    out = io.StringIO()
    return Feed(scheduler, {"rate": 2}, SMALL, out), scheduler, out


def command(steps: int, *, trace: bool) -> dict[str, Any]:
    return {
        "op": "steps",
        "steps": steps,
        "policy": "lpm",
        "waiting": 3,
        "trace": trace,
    }


def test_the_feed_keeps_the_queue_full_and_tells_steps_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    feed, scheduler, out = fed(monkeypatch, command(2, trace=False))
    due = feed.recv_requests()
    assert scheduler.policy.policy == "lpm"
    assert [len(message.input_ids) for message in due] == [48, 48, 48]
    assert due[0].sampling_params.custom_params == {"kv_compress": {"rate": 2}}
    scheduler.waiting_queue = due[:2]
    for extend in (True, False):
        mode = SimpleNamespace(is_extend=lambda extend=extend: extend)
        scheduler.last_batch = SimpleNamespace(forward_mode=mode)
        arrived = feed.recv_requests()
        assert len(arrived) == (1 if extend else 0)
    said = json.loads(out.getvalue())
    assert len(said["prefill"]) == len(said["decode"]) == 1
    assert said["free"] == 3 and said["evictable"] == 7
    assert scheduler.gracefully_exit


def test_calls_of_the_tree_are_counted_from_outside_and_only_while_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    feed, scheduler, out = fed(
        monkeypatch, command(1, trace=True), command(1, trace=False)
    )
    feed.recv_requests()
    scheduler.tree_cache.checkpoint()
    scheduler.tree_cache.insert()
    feed.recv_requests()
    assert not vars(scheduler.tree_cache)
    feed.recv_requests()
    traced, plain = map(json.loads, out.getvalue().splitlines())
    assert (traced["calls"]["checkpoint"], traced["calls"]["insert"]) == (1, 1)
    assert traced["spent"]["checkpoint"] > 0
    assert not plain["calls"]


@pytest.mark.slow
@pytest.mark.skipif(not UPSTREAM.frees_rows, reason="one tree before SGLang 0.5.22")
def test_in_miniature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both trees of SGLang, a pool that fills: same load, evictions in both."""
    out = tmp_path / "host_tree.jsonl"
    host_tree.main(
        [
            *("--systems", "stock,plain-radix", "--waiting", "fcfs:6"),
            *("--rounds", "4", "--steps", "40", "--out", str(out)),
            *("--running", "4", "--groups", "2", "--shared", "320", "--own", "64"),
            *("--output", "16", "--pool", "2048"),
        ]
    )
    (record,) = map(json.loads, out.read_text().splitlines())
    stock, plain = record["rows"]
    assert (stock["tree"], plain["tree"]) == ("UnifiedRadixCache", "RadixCache")
    for row in (stock, plain):
        assert row["running"] > 2 and row["waiting"] >= 5
        assert row["tree_calls_a_step"]["evict_for_alloc"] > 0
        assert 0 < row["tree_ms"] < row["step_ms"]
    for key in ("prefill_steps", "decode_steps", "running", "tree_calls_a_step"):
        assert stock[key] == plain[key], key
    assert "| plain-radix | RadixCache |" in capsys.readouterr().out
