"""bench.quality's runner with systems that answer for each other, as kvpress' do."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.quality.records import read
from bench.quality.systems import Setting, parse_systems
from bench.quality.tasks.sample import Sample
from tests.unit.bench.test_quality_run import Clock, FakeAsker, runner, wish


class Remembering(FakeAsker):
    """Answers for all systems and settings with the first question."""

    def __init__(self, clock: Clock, system: Any, settings: Any, known: Any) -> None:
        super().__init__(clock)
        self.system, self.settings, self.known = system, settings, known

    def remembers(self, keys: Sequence[Any], setting: Setting) -> bool:
        return all((self.system, key, setting) in self.known for key in keys)

    def answer(self, samples: Sequence[Sample], setting: Setting) -> list[Any]:
        begin = self.clock.now
        known = self.remembers([one.key for one in samples], setting)
        answers = super().answer(samples, setting)
        if known:
            self.clock.now = begin
        for one in samples:
            self.known |= {
                (system, one.key, other)
                for system, settings in self.settings.items()
                for other in settings.get(one.key, ())
            }
        return answers


def remembering(run: Any, clock: Clock) -> Callable[[Any], Remembering]:
    """Opens a system; all of them remember together."""
    known: set[Any] = set()
    return lambda system: Remembering(clock, system, run.coming(system), known)


def test_what_is_remembered_is_recorded_when_time_is_up(tmp_path: Path) -> None:
    out, clock = tmp_path / "q.jsonl", Clock()
    # Batches of three, ten seconds each: there is time for two.
    run = runner(wish(samples=9), out, clock, 25, start_cost=0)
    (system,) = run._systems()
    assert [len(set(found)) for found in run.settings(system).values()] == [3] * 9
    asker = remembering(run, clock)(system)
    assert run.run(lambda _: asker) == 9
    assert asker.asked == [(rate, 3) for rate in ("1", "8", "2") for _ in range(2)]
    assert clock.now == 20
    assert {len(cell.samples) for cell in read([out]).values()} == {6}


def test_what_is_remembered_says_nothing_about_what_is_not(tmp_path: Path) -> None:
    clock = Clock()
    # Ten seconds a length, whatever the length.
    wished = wish(samples=3, lengths=[4096, 8192, 16384])
    run = runner(wished, tmp_path / "q.jsonl", clock, 25, start_cost=0)
    assert run.run(remembering(run, clock)) == 9
    assert clock.now == 20


METHODS = ["kvpress:full", "kvpress:norm", "kvpress:drawn"]


def test_systems_of_one_engine_have_one_share(tmp_path: Path) -> None:
    out, clock = tmp_path / "q.jsonl", Clock()
    wished = wish([METHODS[0], "ours", *METHODS[1:]], samples=40)
    run = runner(wished, out, clock, 200)
    opened: list[str] = []
    kvpress = remembering(run, clock)
    other = FakeAsker(clock)

    def open_system(system: Any) -> FakeAsker:
        opened.append(f"{system.name} at {clock.now:g}")
        return other if system.name == "ours" else kvpress(system)

    left = run.run(open_system)
    # A half each. The later methods record what the first one answered for them.
    assert opened == [
        "kvpress:full at 0",
        "ours at 100",
        "kvpress:norm at 200",
        "kvpress:drawn at 200",
    ]
    assert clock.now == 200
    assert len(other.asked) == 10
    assert {
        (key.system, key.setting): len(cell.samples)
        for key, cell in read([out]).items()
        if key.system != "ours"
    } == {
        (METHODS[0], "1"): 30,
        **{(name, rate): 30 for name in METHODS[1:] for rate in ("8", "2")},
    }
    assert left == 10 + 2 * 2 * 10 + (120 - 30)


def test_later_systems_record_what_is_remembered_of_a_batch(tmp_path: Path) -> None:
    out, clock = tmp_path / "q.jsonl", Clock()
    # There is time for one batch of three; then the second system has a larger one.
    run = runner(wish(METHODS[:2], samples=6), out, clock, 15, start_cost=0)
    kvpress = remembering(run, clock)

    def open_system(system: Any) -> FakeAsker:
        run.batch = 3 if system.name == METHODS[0] else 100
        return kvpress(system)

    assert run.run(open_system) == 3 + 2 * 3
    assert clock.now == 10
    assert {
        (key.system, key.setting): sorted(cell.samples)
        for key, cell in read([out]).items()
    } == {
        (METHODS[0], "1"): [0, 1, 2],
        (METHODS[1], "8"): [0, 1, 2],
        (METHODS[1], "2"): [0, 1, 2],
    }


def test_systems_of_one_engine_take_turns_with_a_block(tmp_path: Path) -> None:
    out, clock = tmp_path / "q.jsonl", Clock()
    tasks = ["needle_words", "gsm8k", "topics"]
    wished = replace(wish(METHODS, tasks), block=2)
    run = runner(wished, out, clock)
    opened: list[str] = []
    kvpress = remembering(run, clock)

    def open_system(system: Any) -> FakeAsker:
        opened.append(system.name)
        return kvpress(system)

    assert run.run(open_system) == 0
    assert opened == METHODS * 2
    assert clock.now == 30
    lines = [json.loads(text) for text in out.read_text().splitlines()]
    known = [(line["system"], line["task"]) for line in lines]
    # All of two tasks is recorded before the third one is begun.
    first = known.index((METHODS[0], "topics"))
    assert {task for _, task in known[:first]} == set(tasks[:2])
    assert {task for _, task in known[first:]} == {"topics"}
    assert len(read([out])) == 3 * (1 + 2 * 2)


def test_what_is_coming_is_of_one_engine(tmp_path: Path) -> None:
    words = ["stock", METHODS[0], "ours", METHODS[1]]
    stock, full, ours, norm = parse_systems(words)
    run = runner(wish(words), tmp_path / "q.jsonl", Clock())
    assert list(run.coming(stock)) == [stock]
    assert list(run.coming(ours)) == [ours]
    assert list(run.coming(full)) == [full, norm]
    assert run.coming(norm) == {norm: run.settings(norm)}
