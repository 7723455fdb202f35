"""The same samples answered by Hugging Face transformers with a kvpress method.

A system ``kvpress:NAME`` of `presses`; ``kvpress:full`` is the uncompressed baseline,
``kvpress:rkv`` is `rkv`, which evicts while decoding and is not kvpress'.
Needs an environment with kvpress, whose transformers is older than SGLang's
(`REQUIREMENTS`); neither SGLang nor our backend is imported here.

kvpress as published compresses a context before its question is known. Here the whole
prompt, question inside, is prefilled under the press, as a server gets it: each layer's
cache is compressed once after its attention over all of the prompt, with the prompt's
last tokens as the observed window, and the answer is decoded over what is left, at the
positions it would have had. Decoded tokens are kept. A method keeps
``prompt / rate`` tokens per head on average, window and sinks among them.

A prompt is prefilled once for all methods of a run and all their rates, and all of them
are decoded together. The system that is asked first answers for those that come after
it, which find their answers in a `Memory`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from bench.quality import forced, rkv
from bench.quality.asking import TURN_REPLY, Answer, with_full_text
from bench.quality.hf_decoding import load
from bench.quality.kvpress_answers import WHOLE, Answering, Answers, Label, Prompt
from bench.quality.kvpress_presses import presses
from bench.quality.systems import FULL_PRESS, Setting, System
from bench.quality.tasks.sample import (
    ASK,
    CONVERSATION,
    DICTATED,
    TURNS,
    Sample,
    SampleKey,
    encode,
    encode_parts,
    encode_said,
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


@dataclass
class Memory:
    """What askers of one model know together.

    Attributes
    ----------
    answers : dict
        By sample and label, until they are asked for.
    texts : dict of sample key to Sample
        With the full cache's text filled in.
    references : dict of sample key to Reference
        The full cache's distributions.
    apart : bool
        Whether every method answers for itself alone, since they failed together.
    """

    answers: Answers = field(default_factory=dict)
    texts: dict[SampleKey, Sample] = field(default_factory=dict)
    references: dict[SampleKey, forced.Reference] = field(default_factory=dict)
    apart: bool = False


@functools.cache
def memory(model: str) -> Memory:
    """The memory of a model's folder, one per process."""
    del model
    return Memory()


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
    settings : mapping of System to mapping of sample key to sequence of Setting
        At which settings samples will be asked, of this system and of those that come
        after it. The first question about a sample is answered for all of them, with
        one prefill; the other answers are remembered until they are asked for.
    """

    def __init__(
        self,
        system: System,
        model: str,
        tokenizer: Any,
        settings: Mapping[System, Mapping[SampleKey, Sequence[Setting]]] | None = None,
    ) -> None:
        self.method, self.tokenizer = system.press, tokenizer
        if not _is_known(self.method):
            raise ValueError(
                f"unknown method {self.method!r}; known: {FULL_PRESS}, {rkv.METHOD}, "
                f"{', '.join(presses())}"
            )
        self._memory = memory(model)
        self.answering = Answering(load(model), tokenizer, self._memory.references)
        self._coming = _labels(settings or {})

    def close(self) -> None:
        """Do nothing: only the model is held, which other systems share."""

    def remembers(self, keys: Iterable[SampleKey], setting: Setting) -> bool:
        """Whether answering these samples costs nothing."""
        label = Label(self.method, setting)
        return all((key, label) in self._memory.answers for key in keys)

    def answer(self, samples: Sequence[Sample], setting: Setting) -> list[Answer]:
        """Answers to samples, in their order."""
        label, known = Label(self.method, setting), self._memory.answers
        new = [sample for sample in samples if (sample.key, label) not in known]
        if new:
            self._learn(new, label)
        answers = [known[sample.key, label] for sample in samples]
        for sample in samples:
            known.pop((sample.key, label), None)
        return answers

    def _learn(self, samples: Sequence[Sample], label: Label) -> None:
        """Answer samples, for the methods that come after this one as well."""
        prompts = [
            self._prompt(sample, label, *self._coming.pop(sample.key, ()))
            for sample in self._completed(samples)
        ]
        own = [_only(self.method, prompt) for prompt in prompts]
        if prompts != own and not self._memory.apart:
            try:
                self._memory.answers |= self.answering.answers(prompts)
                return
            except Exception as error:  # it may be another method's, or of memory
                warnings.warn(
                    f"each method for itself from now: {error!r}", stacklevel=2
                )
                self._memory.apart = True
        self._memory.answers |= self.answering.answers(own)

    def _completed(self, samples: Sequence[Sample]) -> list[Sample]:
        """Samples whose text comes from the full cache, with that text filled in."""
        texts = self._memory.texts
        new = [s for s in samples if s.from_full and s.key not in texts]
        asked = [self._prompt(replace(sample, mode=ASK), WHOLE) for sample in new]
        answers = self.answering.answers(asked)
        for sample in new:
            text = answers[sample.key, WHOLE].text
            texts[sample.key] = with_full_text(sample, text, self.tokenizer)
        return [texts[s.key] if s.from_full else s for s in samples]

    def _prompt(self, sample: Sample, *labels: Label) -> Prompt:
        """The sample under those of the labels whose answers are not known."""
        context, question = self._parts(sample)
        new = dict.fromkeys(
            label for label in labels if (sample.key, label) not in self._memory.answers
        )
        return Prompt(sample, context, question, tuple(new))

    def _parts(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Tokens to compress, and tokens to feed after that."""
        if sample.mode == DICTATED:
            return encode_parts(self.tokenizer, sample)
        if sample.mode == CONVERSATION:
            # The history is compressed once, before the last question is known.
            *history, question = encode_said(self.tokenizer, sample)
            return list(chain(*history)), question
        if sample.mode == TURNS:
            # Both turns are known before the second request is compressed.
            return encode_turns(self.tokenizer, sample, TURN_REPLY)[1], []
        return encode(self.tokenizer, sample), []


def _is_known(method: str) -> bool:
    return method in (FULL_PRESS, rkv.METHOD) or method in presses()


def _labels(
    settings: Mapping[System, Mapping[SampleKey, Sequence[Setting]]],
) -> dict[SampleKey, list[Label]]:
    """Labels under which samples will be asked; no method that does not exist."""
    found: dict[SampleKey, list[Label]] = {}
    for system, wanted in settings.items():
        if not _is_known(system.press):
            continue
        for key, some in wanted.items():
            found.setdefault(key, []).extend(Label(system.press, one) for one in some)
    return found


def _only(method: str, prompt: Prompt) -> Prompt:
    """The prompt under the labels of one method."""
    labels = tuple(label for label in prompt.labels if label.method == method)
    return replace(prompt, labels=labels)
