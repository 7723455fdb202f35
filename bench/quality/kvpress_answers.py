"""Prompts answered by many methods of kvpress at many settings, all at once.

A prompt is prefilled once for all of them. What they keep of it are rows of their own,
and rows of all prompts, methods and settings are decoded together: a step's launches
cost the same for one row as for hundreds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bench.quality import forced, rkv
from bench.quality.asking import Answer, with_gold
from bench.quality.hf_decoding import Prefilled, equal_shapes, joined, packed
from bench.quality.kvpress_decoding import generate, think
from bench.quality.kvpress_prefill import prefill
from bench.quality.kvpress_presses import observed_window, presses
from bench.quality.systems import FULL, FULL_PRESS, Setting
from bench.quality.tasks.sample import LIKELIHOOD, Sample, SampleKey


class Label(NamedTuple):
    """A method and how much it may keep."""

    method: str
    setting: Setting


WHOLE = Label(FULL_PRESS, FULL)
"""The full cache."""
Answers = dict[tuple[SampleKey, Label], Answer]


@dataclass(frozen=True)
class Prompt:
    """A sample, the tokens to compress, the tokens to feed after that, and by whom."""

    sample: Sample
    context: list[int]
    question: list[int]
    labels: tuple[Label, ...]

    @property
    def likely(self) -> bool:
        """Whether a given text is decoded."""
        return self.sample.mode == LIKELIHOOD

    @property
    def steps(self) -> int:
        """Most tokens to be decoded."""
        if self.likely:
            return len(self.sample.targets)
        return len(self.question) + self.sample.max_new_tokens

    @property
    def shape(self) -> tuple[Any, int]:
        """Equal for prompts that share a prefill."""
        # What follows makes no difference to a prefill, but numbers that are drawn at
        # random depend on which prompts share it.
        follows = len(self.sample.targets) or len(self.question)
        return (follows, self.labels), len(self.context)

    @property
    def held(self) -> int:
        """Tokens that are kept of it; a method that only masks leaves it whole."""
        tokens = len(self.context)
        return tokens + sum(label.setting.kept(tokens) for label in self.labels)


@dataclass(frozen=True)
class Row:
    """What is left of a prompt under one of its labels."""

    prompt: Prompt
    label: Label
    left: Prefilled

    @property
    def evicts(self) -> bool:
        """Whether what is decoded is evicted, too."""
        return self.label.method == rkv.METHOD

    @property
    def kept(self) -> int:
        """Tokens that the method was allowed, per head on average."""
        return self.label.setting.kept(len(self.prompt.context))

    def mean_resident(self, decoded: int) -> float:
        """Tokens held over so many decode steps, of which none is evicted."""
        full = self.label.method == FULL_PRESS
        held = len(self.prompt.context) if full else self.kept
        return held + len(self.prompt.question) + (decoded + 1) / 2


class Answering:
    """Answers prompts with one model.

    Parameters
    ----------
    model
        Of transformers.
    tokenizer
        The model's.
    references : dict of sample key to Reference
        Distributions of the full cache; those that lack are made, and noted here.
    """

    def __init__(
        self, model: Any, tokenizer: Any, references: dict[SampleKey, forced.Reference]
    ) -> None:
        self.model, self.tokenizer, self.references = model, tokenizer, references
        ends = model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.ends.add(tokenizer.eos_token_id)

    def answers(self, prompts: Sequence[Prompt]) -> Answers:
        """Answers under all labels of the prompts."""
        found: Answers = {}
        for likely in (False, True):
            groups = _groups([one for one in prompts if one.likely == likely])
            for places in joined([sum(p.held for p in group) for group in groups]):
                found |= self._batch([groups[place] for place in places], likely)
        return found

    def _batch(self, groups: Sequence[Sequence[Prompt]], likely: bool) -> Answers:
        """Answers to groups of equal shapes, whose rows are decoded together."""
        rows = [row for group in groups for row in self._rows(group)]
        if likely:
            self._refer([row for row in rows if row.label == WHOLE])
        own = [row for row in rows if row.label in row.prompt.labels]
        found: Answers = {}
        for some in _batches(own):
            decode = self._think if likely else self._generate
            if some[0].evicts:
                decode = self._evict
            for row, answer in zip(some, decode(some), strict=True):
                sample = row.prompt.sample
                found[sample.key, row.label] = with_gold(sample, answer)
        return found

    def _rows(self, group: Sequence[Prompt]) -> list[Row]:
        """What is left of prompts of equal shapes under each of their labels."""
        left = prefill(
            self.model, [prompt.context for prompt in group], self._presses(group)
        )
        return [
            Row(prompt, label, one)
            for label, rows in left.items()
            for prompt, one in zip(group, rows, strict=True)
        ]

    def _presses(self, group: Sequence[Prompt]) -> dict[Label, Any]:
        """What compresses prompts of equal shapes; None keeps everything."""
        found: dict[Label, Any] = {}
        tokens = len(group[0].context)
        for label in group[0].labels:
            discard = 1 - label.setting.kept(tokens) / tokens
            whole = label.method in (FULL_PRESS, rkv.METHOD) or discard <= 0
            press = None if whole else presses()[label.method](discard)
            found[label] = press if tokens > observed_window(press) else None
        if any(p.likely and p.sample.key not in self.references for p in group):
            found[WHOLE] = None
        return found

    def _generate(self, rows: Sequence[Row]) -> list[Answer]:
        prompts = [row.prompt for row in rows]
        texts = generate(
            self.model,
            self.tokenizer,
            self.ends,
            [row.left for row in rows],
            [prompt.question for prompt in prompts],
            [prompt.sample for prompt in prompts],
        )
        return [
            Answer(
                text,
                len(row.prompt.context) + len(row.prompt.question),
                count,
                None if row.label.method == FULL_PRESS else row.kept,
                row.mean_resident(count),
            )
            for row, (text, count) in zip(rows, texts, strict=True)
        ]

    def _evict(self, rows: Sequence[Row]) -> list[Answer]:
        """Answers of a method that evicts while decoding."""
        if any(row.prompt.likely or row.prompt.question for row in rows):
            raise ValueError(f"{rkv.METHOD} answers questions inside of prompts only")
        texts = rkv.generate(
            self.model,
            self.tokenizer,
            self.ends,
            [row.left for row in rows],
            [row.label.setting for row in rows],
            [row.prompt.sample for row in rows],
        )
        return [
            Answer(
                one.text,
                len(row.prompt.context),
                one.tokens,
                row.label.setting.kept(len(row.prompt.context) + one.tokens),
                one.mean_resident,
            )
            for row, one in zip(rows, texts, strict=True)
        ]

    def _think(self, rows: Sequence[Row]) -> list[Answer]:
        references = [self.references[row.prompt.sample.key] for row in rows]
        return [
            Answer(
                "",
                len(row.prompt.context),
                0,
                row.kept,
                row.mean_resident(len(row.prompt.sample.targets)),
                thoughts,
            )
            for row, thoughts in zip(
                rows, self._thoughts(rows, references), strict=True
            )
        ]

    def _refer(self, rows: Sequence[Row]) -> None:
        """Note what the full cache thinks, where that is not known."""
        new = [row for row in rows if row.prompt.sample.key not in self.references]
        for some in _packed(new):
            for row, thoughts in zip(some, self._thoughts(some, None), strict=True):
                assert thoughts.reference
                self.references[row.prompt.sample.key] = thoughts.reference

    def _thoughts(
        self, rows: Sequence[Row], references: Sequence[forced.Reference] | None
    ) -> list[forced.Thoughts]:
        samples = [row.prompt.sample for row in rows]
        return think(self.model, [row.left for row in rows], samples, references)


def _groups(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """Prompts that share a prefill; neighbours end at about the same step."""
    groups = [
        [prompts[place] for place in places]
        for places in equal_shapes([prompt.shape for prompt in prompts])
    ]
    return sorted(groups, key=lambda g: (max(p.steps for p in g), len(g[0].context)))


def _batches(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that are decoded together: those that are evicted meanwhile apart."""
    parts = ([r for r in rows if r.evicts == evicts] for evicts in (False, True))
    return [batch for part in parts for batch in _packed(part)]


def _packed(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that are decoded together."""
    # Masked keys cost every row of a batch some time, so they come last among equals.
    rows = sorted(rows, key=lambda row: row.left.size)
    lengths = [row.left.size[0] for row in rows]
    return [[rows[place] for place in places] for places in packed(lengths)]
