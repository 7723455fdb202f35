"""Measures what is missing, records it at once, and stops at the deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from bench.common.record import write_record
from bench.quality.asking import Answer
from bench.quality.plan import Todo, Wish, batches, blocks, todo
from bench.quality.records import pack, read
from bench.quality.samples import SampleStore
from bench.quality.scoring import result
from bench.quality.systems import Setting, System
from bench.quality.tasks.sample import Sample, SampleKey

START_GUESS = 60.0
"""Seconds that starting an engine is taken to cost before the first one did."""


class Asker(Protocol):
    """What answers the samples of one system."""

    def answer(self, samples: Sequence[Sample], setting: Setting) -> list[Answer]:
        """Answers in the order of the samples."""

    def close(self) -> None:
        """Give back what it holds."""


@runtime_checkable
class Remembering(Protocol):
    """An asker that may have answered a question with an earlier one."""

    def remembers(self, keys: Sequence[SampleKey], setting: Setting) -> bool:
        """Whether answering these samples costs nothing."""


Open = Callable[[System], Asker]
Clock = Callable[[], float]


class Runner:
    """One run.

    Parameters
    ----------
    wish : Wish
    store : SampleStore
    out : Path
        JSON lines are appended; what is there already counts as done.
    also : sequence of Path
        Files whose results count as done, too.
    origin : dict
        Goes into every line: command, commit, hardware, settings.
    seconds : float or None
        Time for everything from now; None has no end.
    batch : int
        Most samples sent to an engine at once.
    clock : callable
    """

    def __init__(
        self,
        wish: Wish,
        store: SampleStore,
        out: Path,
        also: Sequence[Path] = (),
        origin: dict[str, Any] | None = None,
        seconds: float | None = None,
        batch: int = 256,
        clock: Clock = time.monotonic,
    ) -> None:
        self.wish, self.store, self.out, self.batch = wish, store, out, batch
        self.origin, self.clock = origin or {}, clock
        self.cells = list(todo(wish, read([out, *also])))
        self.end = None if seconds is None else clock() + seconds
        self._start_cost = START_GUESS
        # By engine: when its systems have to stop. And those that were started.
        self._stops: dict[str, float] = {}
        self._started: set[str] = set()
        self._latest: dict[str, float] = {}
        store.start(_sample_key(c, i) for c in self.cells for i in c.indices)

    def settings(self, system: System) -> dict[SampleKey, list[Setting]]:
        """Settings that each sample is to be asked at, most important first."""
        found: dict[SampleKey, list[Setting]] = {}
        for cell in self.cells:
            if cell.system == system:
                for index in cell.indices:
                    found.setdefault(_sample_key(cell, index), []).append(cell.setting)
        return found

    def coming(self, system: System) -> dict[System, dict[SampleKey, list[Setting]]]:
        """`settings` of the system, and of those of its engine that come after it."""
        systems = self._systems()
        later = systems[systems.index(system) :]
        mine = system.engine
        return {one: self.settings(one) for one in later if one.engine == mine}

    def _systems(self) -> list[System]:
        return list(dict.fromkeys(cell.system for cell in self.cells))

    def run(self, open_system: Open) -> int:
        """Measure; returns the number of samples that are still missing.

        A system that cannot be started or fails is recorded with its error, and the
        next one has its turn.
        """
        from tqdm import tqdm  # type: ignore[import-untyped]

        left = sum(len(cell.indices) for cell in self.cells)
        turns = list(self._turns())
        with tqdm(total=left, unit="sample", smoothing=0.1) as bar:
            for number, (system, cells) in enumerate(turns):
                stop = self._stop([turn[0] for turn in turns[number:]])
                # An engine that is there already may remember answers.
                new = system.engine not in self._started
                if new and stop is not None and self.clock() + self._start_cost > stop:
                    bar.write(f"{system.name}: no time left to start it")
                    continue
                try:
                    left -= self._system(system, cells, stop, open_system, bar)
                except Exception as error:  # the other systems must still be measured
                    bar.write(f"{system.name} failed: {error!r}")
                    line = {"system": system.name, "error": repr(error)}
                    write_record(self.out, {**self.origin, **line})
        return left

    def _turns(self) -> Iterator[tuple[System, list[Todo]]]:
        """Systems and what each is asked at a time, in their order.

        Systems that share an engine take turns with every block of tasks, so that what
        the first of them has learnt for the others is soon recorded.
        """
        groups: dict[Hashable, list[System]] = {}
        for system in self._systems():
            # Without blocks to take turns with, every system is asked everything.
            group = system.engine if self.wish.block else system
            groups.setdefault(group, []).append(system)
        for sharing in groups.values():
            # An engine of its own is started once.
            parts = blocks(self.wish) if len(sharing) > 1 else [self.wish.tasks]
            for tasks, system in product(parts, sharing):
                own = [cell for cell in self.cells if cell.system == system]
                cells = [cell for cell in own if cell.task in tasks]
                if cells:
                    yield system, cells

    def _stop(self, systems: Sequence[System]) -> float | None:
        """When the first of the systems that are left has to stop.

        Those of one engine have the share of one, which its first system begins; what
        others leave is for all that still come.
        """
        if self.end is None:
            return None
        mine = systems[0].engine
        new = {one.engine for one in systems} - self._stops.keys() - {mine}
        if mine not in self._stops or not new:
            now = self.clock()
            self._stops[mine] = now + (self.end - now) / (1 + len(new))
        return self._stops[mine]

    def _system(
        self,
        system: System,
        cells: list[Todo],
        stop: float | None,
        open_system: Open,
        bar: Any,
    ) -> int:
        begin = self.clock()
        asker = open_system(system)
        if system.engine not in self._started:
            self._started.add(system.engine)
            self._start_cost, self._latest = self.clock() - begin, {}
        done, late = 0, False
        try:
            for group in batches(cells, self.batch):
                some, known = group, _remembered(asker, group)
                if known != group:
                    kinds = {cell.task.name for cell in group}
                    expected = sum(self._latest.get(kind, 0.0) for kind in kinds)
                    late = late or (stop is not None and self.clock() + expected > stop)
                    some = known if late else group
                if some:
                    bar.set_description(f"{system.name} {group[0].setting.label}")
                    done += self._batch(asker, some, bar, some == known)
            if late:
                bar.write(f"{system.name}: out of time")
        finally:
            asker.close()
        return done

    def _batch(self, asker: Asker, group: list[Todo], bar: Any, known: bool) -> int:
        pairs = [(cell, index) for cell in group for index in cell.indices]
        samples = [self.store.get(_sample_key(*pair)) for pair in pairs]
        begin = self.clock()
        answers = asker.answer(samples, group[0].setting)
        seconds = self.clock() - begin
        results: dict[Any, list[dict[str, Any]]] = {cell.key: [] for cell in group}
        for (cell, _), sample, answer in zip(pairs, samples, answers, strict=True):
            results[cell.key].append(result(sample, answer))
        for cell in {cell.key: cell for cell in group}.values():
            line = {
                **cell.key._asdict(),
                "group": cell.task.group,
                "seconds_per_sample": round(seconds / len(pairs), 4),
                "samples": pack(results.pop(cell.key)),
            }
            write_record(self.out, {**self.origin, **line})
        for cell in [] if known else group:
            share = seconds * len(cell.indices) / len(pairs)
            self._latest[cell.task.name] = share
        bar.update(len(pairs))
        return len(pairs)


def _sample_key(cell: Todo, index: int) -> SampleKey:
    return SampleKey(cell.key.task, cell.key.length, cell.key.seed, index)


def _remembered(asker: Asker, group: Sequence[Todo]) -> list[Todo]:
    """What an earlier question, at another setting or of another system, answered."""
    if not isinstance(asker, Remembering):
        return []
    found = []
    for cell in group:
        known = tuple(
            index
            for index in cell.indices
            if asker.remembers([_sample_key(cell, index)], cell.setting)
        )
        if known:
            found.append(replace(cell, indices=known))
    return found
