"""bench.quality's plan, records and runner with an asker that needs no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.quality.asking import Answer
from bench.quality.deadline import START_GUESS, Deadline
from bench.quality.plan import Wish, batches, todo
from bench.quality.records import Key, Results, merge, pack, read, unpack
from bench.quality.run import Runner
from bench.quality.systems import FULL, Setting, parse_setting, parse_systems
from bench.quality.tasks import OWN_LENGTH, TASKS
from bench.quality.tasks.sample import Sample, SampleKey

RATES = [parse_setting(word) for word in ("1", "8", "2")]


def wish(
    systems: Sequence[str] = ("ours",),
    tasks: Sequence[str] = ("multivalue",),
    samples: int = 3,
    lengths: Sequence[int] = (4096,),
) -> Wish:
    return Wish(
        "model",
        parse_systems(systems),
        RATES,
        [TASKS[name] for name in tasks],
        lengths,
        0,
        samples,
    )


def names(wished: Wish) -> list[tuple[str, str, str, int]]:
    return [
        (c.key.system, c.key.setting, c.key.task, c.key.length)
        for c in todo(wished, {})
    ]


def test_cells_come_in_the_order_of_importance() -> None:
    cells = names(wish(["stock", "ours", "ours:window=64"], ["multivalue", "gsm8k"]))
    assert cells == [
        ("stock", "1", "multivalue", 4096),
        ("stock", "1", "gsm8k", OWN_LENGTH),
        *(
            ("ours", rate, task, length)
            for rate in ("1", "8", "2")
            for task, length in (("multivalue", 4096), ("gsm8k", OWN_LENGTH))
        ),
        # Nothing is evicted at rate 1, so the first of a kind answers for all.
        *(
            ("ours:window=64", rate, task, length)
            for rate in ("8", "2")
            for task, length in (("multivalue", 4096), ("gsm8k", OWN_LENGTH))
        ),
    ]


def test_a_full_baseline_answers_for_every_press() -> None:
    cells = names(wish(["kvpress:full", "kvpress:snapkv"]))
    assert [cell[:2] for cell in cells] == [
        ("kvpress:full", "1"),
        ("kvpress:snapkv", "8"),
        ("kvpress:snapkv", "2"),
    ]


def test_a_task_of_its_own_length_is_asked_once() -> None:
    assert len(names(wish(tasks=["gsm8k"], lengths=[4096, 8192]))) == len(RATES)


def test_a_block_of_tasks_is_asked_at_every_setting_first() -> None:
    """So that an engine still has its prompts."""
    wished = wish(tasks=["multivalue", "multiquery", "gsm8k"], lengths=[4096, 8192])
    whole = names(wished)
    blocks = names(replace(wished, block=2))
    assert sorted(blocks) == sorted(whole)
    assert [cell[1:3] for cell in blocks[:7]] == [
        *(
            (rate, task)
            for rate in ("1", "8", "2")
            for task in ("multivalue", "multiquery")
        ),
        ("1", "gsm8k"),
    ]


def test_batches_join_neighbours_of_one_setting() -> None:
    cells = list(todo(wish(tasks=["multivalue", "multiquery"], samples=5), {}))
    groups = list(batches(cells, 7))
    assert sum(len(c.indices) for g in groups for c in g) == 30
    assert all(len({c.setting for c in group}) == 1 for group in groups)
    assert max(sum(len(c.indices) for c in g) for g in groups) <= 7
    assert len(list(batches(cells, 100))) == 3
    assert len(list(batches(cells, 2))) == 18


def line(index: int, score: float, **changes: Any) -> dict[str, Any]:
    key = Key("model", "ours", "8", "multivalue", 4096, 0)
    return {
        **key._asdict(),
        "group": "multi-needles",
        "samples": {"index": [index], "score": [score]},
        "commit": "abc",
        "gpu": None,
        **changes,
    }


def test_lines_are_merged_by_sample(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("\n".join(json.dumps(x) for x in (line(0, 0.5), line(1, 1.0))))
    error = {"system": "ours", "error": "it broke"}
    newer = line(1, 0.25, commit="def", gpu="H200")
    second.write_text(f"{json.dumps(newer)}\n{json.dumps(error)}\n{{cut of")
    ((key, cell),) = read([first, second, tmp_path / "none.jsonl"]).items()
    assert key.setting == "8"
    assert [cell.samples[i]["score"] for i in (0, 1)] == [0.5, 0.25]
    assert cell.missing(4) == [2, 3]
    assert cell.origins == {("abc", "CPU"), ("def", "H200")}
    assert merge([error]) == {}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeStore:
    def __init__(self) -> None:
        self.started: list[Any] = []

    def start(self, keys: Any) -> None:
        self.started = list(keys)

    def get(self, key: SampleKey) -> Sample:
        task, length, seed, index = key
        return Sample(
            task, "g", index, length, seed, "p", ("gold",), 4, "found", question="p"
        )


class FakeAsker:
    """Right when nothing is evicted; every batch takes ten seconds."""

    def __init__(self, clock: Clock, broken: bool = False) -> None:
        self.clock, self.broken, self.closed = clock, broken, False
        self.asked: list[tuple[str, int]] = []

    def answer(self, samples: Sequence[Sample], setting: Setting) -> list[Answer]:
        self.clock.now += 10
        if self.broken:
            raise RuntimeError("out of memory")
        self.asked.append((setting.label, len(samples)))
        return [Answer("gold" if setting == FULL else "", 7) for _ in samples]

    def close(self) -> None:
        self.closed = True


def runner(
    wished: Wish,
    out: Path,
    clock: Clock,
    seconds: float | None = None,
    start_cost: float = START_GUESS,
) -> Any:
    end = None if seconds is None else clock() + seconds
    results = Results(out, origin={"commit": "abc"})
    deadline = Deadline(clock, end, start_cost)
    return Runner(wished, FakeStore(), results, deadline, 3)


def test_a_run_records_every_batch_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out, clock = tmp_path / "q.jsonl", Clock()
    asker = FakeAsker(clock)
    assert runner(wish(), out, clock).run(lambda _: asker) == 0
    assert asker.asked == [("1", 3), ("8", 3), ("2", 3)]
    assert asker.closed
    cells = read([out])
    assert {k.setting: c.samples[0]["score"] for k, c in cells.items()} == {
        "1": 1,
        "8": 0,
        "2": 0,
    }
    more = FakeAsker(clock)
    assert runner(wish(samples=4), out, clock).run(lambda _: more) == 0
    assert more.asked == [("1", 1), ("8", 1), ("2", 1)]
    assert runner(wish(samples=4), out, clock).cells == []


def test_the_deadline_leaves_the_least_important(tmp_path: Path) -> None:
    out, clock = tmp_path / "q.jsonl", Clock()
    asker = FakeAsker(clock)
    # The second and third batch are expected to last ten seconds, as the first did.
    left = runner(wish(), out, clock, START_GUESS + 1 - 35).run(lambda _: asker)
    assert left == 9  # not even the start fits
    left = runner(wish(), out, clock, 61).run(lambda _: asker)
    assert left == 0
    asker = FakeAsker(clock)
    slow = runner(wish(samples=9), out, clock, 65)

    def open_slowly(_: Any) -> FakeAsker:
        clock.now += 40
        return asker

    assert slow.run(open_slowly) == 18 - 6
    assert asker.asked == [("1", 3), ("1", 3)]
    assert asker.closed


def test_a_system_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    out, clock = tmp_path / "q.jsonl", Clock()
    askers = {
        "ours": FakeAsker(clock, broken=True),
        "ours:window=64": FakeAsker(clock),
    }
    left = runner(wish(list(askers)), out, clock).run(lambda s: askers[s.name])
    assert left == 9
    assert askers["ours"].closed
    lines = [json.loads(text) for text in out.read_text().splitlines()]
    assert [x.get("error") for x in lines][0] == "RuntimeError('out of memory')"
    assert {key.system for key in read([out])} == {"ours:window=64"}


def test_every_system_has_its_share_of_the_time(tmp_path: Path) -> None:
    out, clock = tmp_path / "q.jsonl", Clock()
    askers: dict[str, FakeAsker] = {}

    def open_system(system: Any) -> FakeAsker:
        return askers.setdefault(system.name, FakeAsker(clock))

    wished = wish(["ours", "ours:window=64"], samples=30)
    assert runner(wished, out, clock, 200).run(open_system) > 0
    assert set(askers) == {"ours", "ours:window=64"}
    assert len(askers["ours"].asked) == 10  # half of the time
    assert clock.now <= 200


@pytest.mark.parametrize("word", ["0.5", "b0", "x", "b1.5"])
def test_wrong_settings_are_refused(word: str) -> None:
    with pytest.raises(ValueError, match=r"no setting|must be"):
        parse_setting(word)


def test_settings_and_what_they_keep() -> None:
    assert parse_setting("8x") == Setting(rate=8)
    assert parse_setting("b512").label == "b512"
    assert Setting(rate=8).kept(4096) == 512
    assert Setting(budget=512).kept(300) == 300
    assert Setting(rate=2.5).label == "2.5"


def test_systems_are_read_as_they_are_written() -> None:
    words = ["stock", "ours", "ours:allocation=head,window=64", "kvpress:snapkv"]
    assert [s.name for s in parse_systems([*words, "stock"])] == words
    assert parse_systems(["ours:window=64,allocation=head"])[0].name == words[2]
    for word in ("theirs", "stock:a=1", "kvpress", "ours:window"):
        with pytest.raises(ValueError, match="OPTION=VALUE"):
            parse_systems([word])


def test_columns_of_results_come_back() -> None:
    results = [{"index": 0, "score": 1 / 3}, {"index": 1, "score": 1.0, "kl": 0.5}]
    packed = pack(results)
    assert packed == {"index": [0, 1], "score": [0.33333, 1.0], "kl": [None, 0.5]}
    assert unpack(packed)[1] == results[1]
