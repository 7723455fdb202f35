"""Builds samples ahead of time, in processes of their own.

Making a prompt of the right length tokenizes it a few times: minutes for a large run,
which would otherwise keep the engine waiting.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

from bench.quality.tasks import TASKS, make_sample
from bench.quality.tasks.corpus import Corpus
from bench.quality.tasks.sample import Sample, SampleKey

CHUNK = 8

_made: dict[str, Any] = {}


def _open(model: str, data: Path) -> None:
    """Load in a worker what every sample needs."""
    from transformers import AutoTokenizer

    _made["tokenizer"] = AutoTokenizer.from_pretrained(model)
    _made["corpus"] = Corpus(data)


def _make(keys: list[SampleKey]) -> list[Sample]:
    tools = _made["tokenizer"], _made["corpus"]
    return [
        make_sample(TASKS[key.task], key.length, key.seed, key.number, *tools)
        for key in keys
    ]


class SampleStore:
    """Samples by key; each is built once.

    Parameters
    ----------
    model : str
        Folder of the tokenizer.
    data : Path
        Folder of the evaluation data.
    workers : int
        Processes; 0 builds in this one when a sample is asked for.
    """

    def __init__(self, model: str, data: Path, workers: int) -> None:
        self._model, self._data = model, data
        self._pool: ProcessPoolExecutor | None = None
        if workers:
            self._pool = ProcessPoolExecutor(
                workers,
                multiprocessing.get_context("spawn"),
                initializer=_open,
                initargs=(model, data),
            )
        self._coming: dict[SampleKey, tuple[Future[list[Sample]], int]] = {}
        self._made: dict[SampleKey, Sample] = {}

    def start(self, keys: Iterable[SampleKey]) -> None:
        """Begin to build samples, in this order."""
        if self._pool is None:
            return
        new = [key for key in dict.fromkeys(keys) if key not in self._coming]
        for start in range(0, len(new), CHUNK):
            chunk = new[start : start + CHUNK]
            future = self._pool.submit(_make, chunk)
            self._coming |= {key: (future, i) for i, key in enumerate(chunk)}

    def get(self, key: SampleKey) -> Sample:
        """The sample, once it is there."""
        if key not in self._made:
            if key in self._coming:
                future, place = self._coming.pop(key)
                self._made[key] = future.result()[place]
            else:
                if not _made:
                    _open(self._model, self._data)
                self._made[key] = _make([key])[0]
        return self._made[key]

    def close(self) -> None:
        """Stop the processes; what was not begun is dropped."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
