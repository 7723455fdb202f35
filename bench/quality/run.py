"""Measures what is missing, records it at once, and stops at the deadline."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, Protocol, runtime_checkable

from bench.quality.asking import Answer
from bench.quality.deadline import Deadline, Share
from bench.quality.plan import Todo, Wish, batches, blocks, todo
from bench.quality.records import Results, pack
from bench.quality.samples import SampleStore
from bench.quality.scoring import result
from bench.quality.systems import Setting, System
from bench.quality.tasks.sample import Sample, SampleKey


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


class Runner:
    """One run.

    Parameters
    ----------
    wish : Wish
    store : SampleStore
    results : Results
        What is done already, and where more goes.
    deadline : Deadline
    batch : int
        Most samples sent to an engine at once.
    """

    def __init__(
        self,
        wish: Wish,
        store: SampleStore,
        results: Results,
        deadline: Deadline,
        batch: int = 256,
    ) -> None:
        self.wish, self.store, self.batch = wish, store, batch
        self.results, self.deadline = results, deadline
        self.cells = list(todo(wish, results.done))
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
                engines = [turn[0].engine for turn in turns[number:]]
                share = self.deadline.share_of(engines)
                if not share.room_to_start():
                    bar.write(f"{system.name}: no time left to start it")
                    continue
                try:
                    left -= self._system(system, cells, share, open_system, bar)
                except Exception as error:  # the other systems must still be measured
                    bar.write(f"{system.name} failed: {error!r}")
                    self.results.add({"system": system.name, "error": repr(error)})
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

    def _system(
        self,
        system: System,
        cells: list[Todo],
        share: Share,
        open_system: Open,
        bar: Any,
    ) -> int:
        with share.starting():
            asker = open_system(system)
        done = 0
        try:
            for group in batches(cells, self.batch):
                some, known = group, _remembered(asker, group)
                # What is remembered costs nothing.
                if known != group and not share.room_for(c.task.name for c in group):
                    some = known
                if some:
                    bar.set_description(f"{system.name} {group[0].setting.label}")
                    done += self._batch(asker, some, bar, some == known)
            if share.late:
                bar.write(f"{system.name}: out of time")
        finally:
            asker.close()
        return done

    def _batch(self, asker: Asker, group: list[Todo], bar: Any, known: bool) -> int:
        pairs = [(cell, index) for cell in group for index in cell.indices]
        samples = [self.store.get(_sample_key(*pair)) for pair in pairs]
        begin = self.deadline.clock()
        answers = asker.answer(samples, group[0].setting)
        seconds = self.deadline.clock() - begin
        found: dict[Any, list[dict[str, Any]]] = {cell.key: [] for cell in group}
        for (cell, _), sample, answer in zip(pairs, samples, answers, strict=True):
            found[cell.key].append(result(sample, answer))
        for cell in {cell.key: cell for cell in group}.values():
            line = {
                **cell.key._asdict(),
                "group": cell.task.group,
                "seconds_per_sample": round(seconds / len(pairs), 4),
                "samples": pack(found.pop(cell.key)),
            }
            self.results.add(line)
        if not known:
            costs = {
                cell.task.name: seconds * len(cell.indices) / len(pairs)
                for cell in group
            }
            self.deadline.learn(costs)
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
