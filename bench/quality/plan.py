"""Which cells are still to be measured, most important first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from bench.quality.records import Cell, Key
from bench.quality.systems import Setting, System
from bench.quality.tasks import OWN_LENGTH, Task

SAMPLES_LEFT = 3
"""Exit status of a run that had to stop."""


@dataclass(frozen=True)
class Wish:
    """What a run was asked for.

    Systems, settings, tasks and lengths stand in the order of their importance.

    `block`: so many tasks are asked at every setting before the next ones; an engine
    finds their prompts in its prefix cache if it has room for them, and systems that
    share an engine take turns with every block. 0: all tasks.
    """

    model: str
    systems: Sequence[System]
    settings: Sequence[Setting]
    tasks: Sequence[Task]
    lengths: Sequence[int]
    seed: int
    samples: int
    block: int = 0


@dataclass(frozen=True)
class Todo:
    """Samples of a cell that are missing."""

    key: Key
    system: System
    setting: Setting
    task: Task
    indices: tuple[int, ...]


def is_asked(system: System, setting: Setting, systems: Sequence[System]) -> bool:
    """Whether a setting is for this one of the systems, see `todo`."""
    if not setting.is_full:
        return not system.never_evicts
    first = next(one for one in systems if one.kind == system.kind)
    return system.never_evicts or system == first


def todo(wish: Wish, done: Mapping[Key, Cell]) -> Iterator[Todo]:
    """Missing cells of all systems: by system, length, block of tasks, setting, task.

    An engine serves one system, so systems come first; the caller gives each of them
    its share of the time. Where nothing is evicted the systems of a kind are one: the
    first of them answers for all.
    """
    for system in wish.systems:
        seen: set[Key] = set()
        for length, tasks in product(wish.lengths, blocks(wish)):
            for setting in wish.settings:
                if not is_asked(system, setting, wish.systems):
                    continue
                for task in tasks:
                    key = key_for(wish, system, setting, task, length)
                    cell = done.get(key, Cell(key, task.group))
                    missing = tuple(cell.missing(wish.samples))
                    if missing and key not in seen:
                        seen.add(key)
                        yield Todo(key, system, setting, task, missing)


def blocks(wish: Wish) -> Iterator[Sequence[Task]]:
    """The tasks that are asked at every setting before the next ones."""
    size = wish.block or len(wish.tasks)
    for start in range(0, len(wish.tasks), size):
        yield wish.tasks[start : start + size]


def key_for(
    wish: Wish, system: System, setting: Setting, task: Task, length: int
) -> Key:
    """Key of a cell; tasks with a length of their own have one cell only."""
    return Key(
        wish.model,
        system.name,
        setting.label,
        task.name,
        length if task.fits else OWN_LENGTH,
        wish.seed,
    )


def batches(cells: Sequence[Todo], size: int) -> Iterator[list[Todo]]:
    """Neighbouring cells of one setting, together at most `size` samples.

    A cell with more samples than that is split.
    """
    batch: list[Todo] = []
    count = 0
    for cell in cells:
        for start in range(0, len(cell.indices), size):
            indices = cell.indices[start : start + size]
            part = Todo(cell.key, cell.system, cell.setting, cell.task, indices)
            other = batch and batch[0].setting != cell.setting
            if batch and (other or count + len(indices) > size):
                yield batch
                batch, count = [], 0
            batch.append(part)
            count += len(indices)
    if batch:
        yield batch
