"""The same samples answered by Hugging Face transformers with a kvpress method.

A system ``kvpress:NAME`` of `presses`; ``kvpress:full`` is the uncompressed baseline.
Needs an environment with kvpress, whose transformers is older than SGLang's
(`REQUIREMENTS`); neither SGLang nor our backend is imported here.

kvpress as published compresses a context before its question is known. Here the whole
prompt, question inside, is prefilled under the press, as a server gets it: each layer's
cache is compressed once after its attention over all of the prompt, with the prompt's
last tokens as the observed window, and the answer is decoded over what is left, at the
positions it would have had. Decoded tokens are kept. A method keeps
``prompt / rate`` tokens per head on average, window and sinks among them.

A prompt is prefilled once for all rates, and prompts are decoded together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.quality import forced
from bench.quality.asking import TURN_REPLY, Answer, with_full_text, with_gold
from bench.quality.hf_decoding import Prefilled, equal_shapes, joined, load
from bench.quality.kvpress_decoding import generate, think
from bench.quality.kvpress_prefill import prefill
from bench.quality.kvpress_presses import presses
from bench.quality.samples import SampleKey
from bench.quality.systems import FULL, FULL_PRESS, Setting, System
from bench.quality.tasks.sample import (
    ASK,
    DICTATED,
    LIKELIHOOD,
    TURNS,
    Sample,
    encode,
    encode_parts,
    encode_turns,
)

REQUIREMENTS = (
    "kvpress==0.5.5",
    "transformers==5.2.0",
    "accelerate",
    "cachetools==5.5.2",
    "fire==0.6.0",
    "peft",
    "termcolor",
    "six",
)
"""Install with ``pip install --no-deps --target DIR`` and put DIR first in PYTHONPATH.
Torch, datasets and numpy come from the environment of SGLang."""


# Texts and distributions of the full cache, by model and sample: every method needs
# the same ones.
_full_texts: dict[Any, Sample] = {}
_full_references: dict[Any, forced.Reference] = {}


@dataclass(frozen=True)
class _Prompt:
    """A sample, the tokens to compress, and the tokens to feed after that."""

    sample: Sample
    context: list[int]
    question: list[int]
    settings: tuple[Setting, ...]

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
        return (self.likely, follows, self.settings), len(self.context)


_Answers = dict[tuple[SampleKey, Setting], Answer]
_Cached = tuple[_Prompt, Prefilled]


class PressAsker:
    """Asks one method of kvpress.

    Parameters
    ----------
    system : System
        Of kind ``kvpress``.
    model : str
        Folder of the model.
    tokenizer
        The model's.
    settings : mapping of sample key to sequence of Setting, optional
        At which settings samples will be asked. The first question about a sample is
        answered at all of them, with one prefill; the other answers are remembered
        until they are asked for.
    """

    def __init__(
        self,
        system: System,
        model: str,
        tokenizer: Any,
        settings: Mapping[SampleKey, Sequence[Setting]] | None = None,
    ) -> None:
        self.name, self.tokenizer, self.folder = system.press, tokenizer, model
        self.model = load(model)
        if self.name != FULL_PRESS and self.name not in presses():
            raise ValueError(
                f"unknown method {self.name!r}; known: {FULL_PRESS}, "
                f"{', '.join(presses())}"
            )
        ends = self.model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.ends.add(tokenizer.eos_token_id)
        self._coming = dict(settings or {})
        self._known: _Answers = {}

    def close(self) -> None:
        """Nothing is held but the model, which other systems share."""

    def remembers(self, keys: Iterable[SampleKey], setting: Setting) -> bool:
        """Whether answering these samples costs nothing."""
        return all((key, setting) in self._known for key in keys)

    def answer(self, samples: Sequence[Sample], setting: Setting) -> list[Answer]:
        """Answers to samples, in their order."""
        new = [s for s in samples if (s.key, setting) not in self._known]
        prompts = [
            self._prompt(sample, setting, *self._coming.pop(sample.key, ()))
            for sample in self._completed(new)
        ]
        self._known |= self._answers(prompts)
        answers = [self._known[sample.key, setting] for sample in samples]
        for sample in samples:
            self._known.pop((sample.key, setting), None)
        return answers

    def _completed(self, samples: Sequence[Sample]) -> list[Sample]:
        """Samples whose text comes from the full cache, with that text filled in."""
        new = [s for s in samples if s.from_full and self._full(s) not in _full_texts]
        asked = [self._prompt(replace(sample, mode=ASK), FULL) for sample in new]
        answers = self._answers(asked)
        for sample in new:
            text = answers[sample.key, FULL].text
            filled = with_full_text(sample, text, self.tokenizer)
            _full_texts[self._full(sample)] = filled
        return [_full_texts[self._full(s)] if s.from_full else s for s in samples]

    def _full(self, sample: Sample) -> Any:
        """Where the full cache's text and distribution are."""
        return self.folder, *sample.key

    def _prompt(self, sample: Sample, *settings: Setting) -> _Prompt:
        context, question = self._parts(sample)
        return _Prompt(sample, context, question, tuple(dict.fromkeys(settings)))

    def _parts(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Tokens to compress, and tokens to feed after that."""
        if sample.mode == DICTATED:
            return encode_parts(self.tokenizer, sample)
        if sample.mode == TURNS:
            # Both turns are known before the second request is compressed.
            return encode_turns(self.tokenizer, sample, TURN_REPLY)[1], []
        return encode(self.tokenizer, sample), []

    def _answers(self, prompts: Sequence[_Prompt]) -> _Answers:
        """Answers at all settings of the prompts."""
        groups = [
            [prompts[place] for place in places]
            for places in equal_shapes([prompt.shape for prompt in prompts])
        ]
        answers: _Answers = {}
        for likely in (False, True):
            some = [group for group in groups if group[0].likely == likely]
            # Neighbours end at about the same step and need little padding.
            some.sort(key=lambda g: (max(p.steps for p in g), len(g[0].context)))
            for batch in joined([(len(g), len(g[0].context)) for g in some]):
                answers |= self._batch([some[place] for place in batch])
        return answers

    def _batch(self, groups: Sequence[Sequence[_Prompt]]) -> _Answers:
        """Answers to groups of equal shapes, which are decoded together."""
        caches = self._caches(groups)
        decode = self._generate
        if groups[0][0].likely:
            decode = self._think
            self._refer(caches.get(FULL, []))
        answers: _Answers = {}
        for setting in list(caches):
            # Out of the dictionary, so that one is given back before the next is made.
            cached = [one for one in caches.pop(setting) if setting in one[0].settings]
            for (prompt, _), answer in zip(
                cached, decode(cached, setting) if cached else [], strict=True
            ):
                key = prompt.sample.key, setting
                answers[key] = with_gold(prompt.sample, answer)
        return answers

    def _caches(
        self, groups: Sequence[Sequence[_Prompt]]
    ) -> dict[Setting, list[_Cached]]:
        """What is left of the prompts at each of their settings."""
        caches: dict[Setting, list[_Cached]] = {}
        for group in groups:
            contexts = [prompt.context for prompt in group]
            kept = prefill(self.model, contexts, self._presses(group))
            for setting, rows in kept.items():
                caches.setdefault(setting, []).extend(zip(group, rows, strict=True))
        return caches

    def _presses(self, group: Sequence[_Prompt]) -> dict[Setting, Any]:
        """What compresses prompts of equal shapes; None keeps everything."""
        found: dict[Setting, Any] = {}
        tokens = len(group[0].context)
        for setting in group[0].settings:
            discard = 1 - setting.kept(tokens) / tokens
            whole = self.name == FULL_PRESS or discard <= 0
            found[setting] = None if whole else presses()[self.name](discard)
        likely = [p.sample for p in group if p.likely]
        if any(self._full(sample) not in _full_references for sample in likely):
            found[FULL] = None
        return found

    def _generate(self, cached: Sequence[_Cached], setting: Setting) -> list[Answer]:
        prompts = [prompt for prompt, _ in cached]
        texts = generate(
            self.model,
            self.tokenizer,
            self.ends,
            [rows for _, rows in cached],
            [prompt.question for prompt in prompts],
            [prompt.sample for prompt in prompts],
        )
        return [
            Answer(
                text,
                len(prompt.context) + len(prompt.question),
                count,
                None if self.name == FULL_PRESS else setting.kept(len(prompt.context)),
            )
            for prompt, (text, count) in zip(prompts, texts, strict=True)
        ]

    def _think(self, cached: Sequence[_Cached], setting: Setting) -> list[Answer]:
        samples = [prompt.sample for prompt, _ in cached]
        references = [_full_references[self._full(sample)] for sample in samples]
        rows = [row for _, row in cached]
        lengths = [len(prompt.context) for prompt, _ in cached]
        return [
            Answer("", length, 0, setting.kept(length), thoughts)
            for length, thoughts in zip(
                lengths, think(self.model, rows, samples, references), strict=True
            )
        ]

    def _refer(self, cached: Sequence[_Cached]) -> None:
        """Note what the full cache thinks, where that is not known."""
        new = [c for c in cached if self._full(c[0].sample) not in _full_references]
        if not new:
            return
        samples = [prompt.sample for prompt, _ in new]
        made = think(self.model, [row for _, row in new], samples, None)
        for sample, thoughts in zip(samples, made, strict=True):
            assert thoughts.reference
            _full_references[self._full(sample)] = thoughts.reference
