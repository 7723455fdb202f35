"""What every head keeps: one JSON line a system, setting, task and length.

    python -m bench.quality heads --model DIR --tasks ruler qa --rates 4 8 \\
        --samples 20 --length 4096 --out bench/results/heads.jsonl
    python -m bench.quality plot bench/results/heads.jsonl --out docs/plots

Prompts are served for one token, which is when the pass behind the prefill is over; the
engine reports what each head keeps of them (``report_heads``). Lines may stand in one
file with those of ``run``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.common.record import read_lines, write_record
from bench.quality.asking import TURN_REPLY
from bench.quality.plan import Wish, key_for
from bench.quality.records import Key
from bench.quality.samples import SampleStore
from bench.quality.systems import OURS, Setting, System
from bench.quality.tasks import Task
from bench.quality.tasks.sample import (
    DICTATED,
    TURNS,
    Sample,
    SampleKey,
    encode,
    encode_parts,
    encode_turns,
)

FIELD = "kept_per_head"
"""Marks a line: mean kept fraction, a list of heads for each layer."""
DIGITS = 5
BATCH = 64
"""Prompts sent at once."""


class Todo(NamedTuple):
    """A line that is to be measured."""

    key: Key
    system: System
    setting: Setting
    task: Task


def todo(wish: Wish, done: Iterable[dict[str, Any]]) -> Iterator[Todo]:
    """Lines still to be measured: no record of as many prompts stands for them."""
    there = {
        tuple(record[name] for name in Key._fields)
        for record in done
        if FIELD in record and record["prompts"] >= wish.samples
    }
    seen = set(there)
    for system in wish.systems:
        if system.kind != OURS:
            raise ValueError(f"only ours reports what heads keep, not {system.name}")
        for length in wish.lengths:
            for setting in wish.settings:
                for task in wish.tasks:
                    key = key_for(wish, system, setting, task, length)
                    if not setting.is_full and key not in seen:
                        seen.add(key)
                        yield Todo(key, system, setting, task)


def context(tokenizer: Any, sample: Sample) -> list[int]:
    """Tokens of the prompt that is compressed."""
    if sample.mode == DICTATED:
        return encode_parts(tokenizer, sample)[0]
    if sample.mode == TURNS:
        return encode_turns(tokenizer, sample, TURN_REPLY)[0]
    return encode(tokenizer, sample)


def fractions(meta: dict[str, Any]) -> list[float]:
    """Fraction of a prompt that each head holds after its last pass, layer-major.

    The rest of the prompt behind the last whole page is in every head.

    Raises
    ------
    RuntimeError
        If there was no pass: the setting keeps the whole prompt.
    """
    info = meta["kv_compress"]
    packed = info.get("packed_tokens_per_head")
    if not packed:
        raise RuntimeError(
            f"nothing was evicted of {info['logical_tokens']} tokens: give longer "
            "prompts or higher rates"
        )
    rest = info["resident_tokens"] - sum(packed) / len(packed)
    return [(tokens + rest) / info["logical_tokens"] for tokens in packed]


@dataclass
class HeadAsker:
    """Asks an engine what its heads keep.

    Attributes
    ----------
    engine : sglang.Engine
    tokenizer
    layers : int
        Of the model.
    """

    engine: Any
    tokenizer: Any
    layers: int

    def ask(self, samples: Sequence[Sample], setting: Setting) -> dict[str, Any]:
        """Figures of a line: mean over prompts, and its spread over prompts."""
        rows: list[list[float]] = []
        tokens = 0
        for start in range(0, len(samples), BATCH):
            ids = [context(self.tokenizer, s) for s in samples[start : start + BATCH]]
            params = {
                "temperature": 0.0,
                "max_new_tokens": 1,
                "custom_params": {
                    "kv_compress": {**setting.option, "report_heads": True}
                },
            }
            outputs = self.engine.generate(
                input_ids=ids, sampling_params=[params] * len(ids)
            )
            rows += [fractions(output["meta_info"]) for output in outputs]
            tokens += sum(map(len, ids))
        kept = np.array(rows).reshape(len(rows), self.layers, -1)
        return {
            "prompts": len(rows),
            "prompt_tokens": round(tokens / len(rows)),
            FIELD: kept.mean(0).round(DIGITS).tolist(),
            "spread_per_head": kept.std(0).round(DIGITS).tolist(),
        }

    def close(self) -> None:
        """Stop the engine."""
        self.engine.shutdown()


def _sample_keys(key: Key, samples: int) -> list[SampleKey]:
    return [SampleKey(key.task, key.length, key.seed, i) for i in range(samples)]


def measure(
    wish: Wish,
    store: SampleStore,
    out: Path,
    origin: dict[str, Any],
    open_system: Callable[[System], HeadAsker],
) -> int:
    """Measure what is missing in `out`; returns the number of new lines."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    lines = list(todo(wish, read_lines(out)))
    store.start(key for line in lines for key in _sample_keys(line.key, wish.samples))
    with tqdm(total=len(lines), unit="line") as bar:
        for system in dict.fromkeys(line.system for line in lines):
            asker = open_system(system)
            try:
                for key, _, setting, task in (x for x in lines if x.system == system):
                    bar.set_description(f"{system.name} {setting.label} {task.name}")
                    samples = [store.get(k) for k in _sample_keys(key, wish.samples)]
                    figures = asker.ask(samples, setting)
                    line = {**key._asdict(), "group": task.group, **figures}
                    write_record(out, {**origin, **line})
                    bar.update()
            finally:
                asker.close()
    return len(lines)
