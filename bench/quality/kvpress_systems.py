"""The same samples answered by Hugging Face transformers with a kvpress method.

A system ``kvpress:NAME`` of `PRESSES`; ``kvpress:full`` is the uncompressed baseline.
Needs an environment with kvpress, whose transformers is older than SGLang's
(`REQUIREMENTS`); neither SGLang nor our backend is imported here.

kvpress as published compresses a context before its question is known. Here the whole
prompt, question inside, is prefilled under the press, as a server gets it: each layer's
cache is compressed once after its attention over all of the prompt, with the prompt's
last tokens as the observed window, and the answer is decoded over what is left, at the
positions it would have had. Decoded tokens are kept. A method keeps
``prompt / rate`` tokens per head on average, window and sinks among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from bench.quality import forced
from bench.quality.asking import TURN_REPLY, Answer, with_full_text, with_gold
from bench.quality.hf_decoding import Decoding, equal_shapes, load
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
Part = tuple[list[int], list[int]]


def presses() -> dict[str, Callable[[float], Any]]:
    """Methods by name; each is made with the fraction of KVs to discard."""
    import kvpress as kp  # type: ignore[import-not-found]

    return {
        "snapkv": lambda r: kp.SnapKVPress(compression_ratio=r),
        # Our window and pooling.
        "snapkv32": lambda r: kp.SnapKVPress(
            compression_ratio=r, window_size=32, kernel_size=7
        ),
        "adakv": lambda r: kp.AdaKVPress(kp.SnapKVPress(compression_ratio=r)),
        "expected": lambda r: kp.ExpectedAttentionPress(compression_ratio=r),
        "adakv-expected": lambda r: kp.AdaKVPress(
            kp.ExpectedAttentionPress(compression_ratio=r)
        ),
        "keydiff": lambda r: kp.KeyDiffPress(compression_ratio=r),
        "tova": lambda r: kp.TOVAPress(compression_ratio=r),
        "pyramidkv": lambda r: kp.PyramidKVPress(compression_ratio=r),
        "streaming": lambda r: kp.StreamingLLMPress(compression_ratio=r, n_sink=4),
        "random": lambda r: kp.RandomPress(compression_ratio=r),
    }


# Texts and distributions of the full cache, by model and sample: every method needs
# the same ones.
_full_texts: dict[Any, Sample] = {}
_full_references: dict[Any, forced.Reference] = {}


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
    """

    def __init__(self, system: System, model: str, tokenizer: Any) -> None:
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

    def close(self) -> None:
        """Nothing is held but the model, which other systems share."""

    def answer(self, samples: Sequence[Sample], setting: Setting) -> list[Answer]:
        """Answers to samples, in their order."""
        samples = [self._completed(sample) for sample in samples]
        parts = [self._parts(sample) for sample in samples]
        shapes = [
            (
                sample.mode == LIKELIHOOD,
                len(context),
                len(sample.targets) or len(question),
            )
            for sample, (context, question) in zip(samples, parts, strict=True)
        ]
        answers: dict[int, Answer] = {}
        for places in equal_shapes(shapes):
            some = [samples[i] for i in places]
            chosen = [parts[i] for i in places]
            ask = self._decode if shapes[places[0]][0] else self._generate
            answers |= dict(zip(places, ask(some, chosen, setting), strict=True))
        return [with_gold(samples[i], answers[i]) for i in range(len(samples))]

    def _completed(self, sample: Sample) -> Sample:
        """The sample with the full cache's text, if it is made from that."""
        key = (self.folder, *sample.key)
        if not sample.from_full:
            return sample
        if key not in _full_texts:
            asked = replace(sample, mode=ASK)
            text = self._generate([asked], [self._parts(asked)], FULL)[0].text
            _full_texts[key] = with_full_text(sample, text, self.tokenizer)
        return _full_texts[key]

    def _parts(self, sample: Sample) -> Part:
        """Tokens to compress, and tokens to feed after that."""
        if sample.mode == DICTATED:
            return encode_parts(self.tokenizer, sample)
        if sample.mode == TURNS:
            # Both turns are known before the second request is compressed.
            return encode_turns(self.tokenizer, sample, TURN_REPLY)[1], []
        return encode(self.tokenizer, sample), []

    def _prefill(self, contexts: list[list[int]], setting: Setting) -> Decoding:
        """Prompts of equal length, compressed after the whole of them."""
        import torch
        from transformers import DynamicCache

        tokens = len(contexts[0])
        discard = 1 - setting.kept(tokens) / tokens
        press: Any = nullcontext()
        if self.name != FULL_PRESS and discard > 0:
            press = presses()[self.name](discard)(self.model)
        torch.manual_seed(0)  # for the random method
        cache = DynamicCache()
        ids = torch.tensor(contexts, device=self.model.device)
        with press:
            logits = self.model(
                input_ids=ids, past_key_values=cache, logits_to_keep=1
            ).logits
        return Decoding(self.model, cache, tokens, logits[:, -1].float())

    def _generate(
        self, samples: Sequence[Sample], parts: list[Part], setting: Setting
    ) -> list[Answer]:
        import torch

        with torch.inference_mode():
            state = self._prefill([context for context, _ in parts], setting)
            for column in zip(*(question for _, question in parts), strict=True):
                state.step(torch.tensor(column, device=self.model.device))
            said: list[list[int]] = [[] for _ in samples]
            texts = [""] * len(samples)
            running = set(range(len(samples)))
            for _ in range(max(sample.max_new_tokens for sample in samples)):
                tokens = state.logits.argmax(-1)
                for i, token in enumerate(tokens.tolist()):
                    if i in running and self._ended(samples[i], said[i], token):
                        running.discard(i)
                if not running:
                    break
                state.step(tokens)
        for i, sample in enumerate(samples):
            text = self.tokenizer.decode(said[i], skip_special_tokens=True)
            for stop in sample.stop:
                text = text.partition(stop)[0]
            texts[i] = text
        resident = setting.kept(len(parts[0][0])) if self.name != FULL_PRESS else None
        return [
            Answer(text, sum(map(len, part)), len(ids), resident)
            for text, part, ids in zip(texts, parts, said, strict=True)
        ]

    def _ended(self, sample: Sample, said: list[int], token: int) -> bool:
        """Take the token, unless the answer is over before it."""
        if token in self.ends:
            return True
        said.append(token)
        if len(said) >= sample.max_new_tokens:
            return True
        if not sample.stop:
            return False
        # A stop is a few tokens long.
        tail = self.tokenizer.decode(said[-16:])
        return any(stop in tail for stop in sample.stop)

    def _decode(
        self, samples: Sequence[Sample], parts: list[Part], setting: Setting
    ) -> list[Answer]:
        """Likelihoods of targets of equal length."""
        contexts = [context for context, _ in parts]
        keys = [(self.folder, *sample.key) for sample in samples]
        new = [i for i, key in enumerate(keys) if key not in _full_references]
        if new:
            some = [samples[i] for i in new]
            full = self._think(some, [contexts[i] for i in new], FULL, None)
            for i, thoughts in zip(new, full, strict=True):
                assert thoughts.reference
                _full_references[keys[i]] = thoughts.reference
        references = [_full_references[key] for key in keys]
        return [
            Answer("", len(context), 0, setting.kept(len(context)), thoughts)
            for context, thoughts in zip(
                contexts,
                self._think(samples, contexts, setting, references),
                strict=True,
            )
        ]

    def _think(
        self,
        samples: Sequence[Sample],
        contexts: list[list[int]],
        setting: Setting,
        references: list[forced.Reference] | None,
    ) -> list[forced.Thoughts]:
        import torch

        rows = range(len(samples))
        jobs = [
            forced.job(samples[i].targets, references[i] if references else None)
            for i in rows
        ]
        targets = torch.tensor([s.targets for s in samples], device=self.model.device)
        values, best = [], []
        with torch.inference_mode():
            state = self._prefill(contexts, setting)
            for at in range(targets.shape[1]):
                own = state.logits.log_softmax(-1)
                seen = [forced.observe(own[i], jobs[i], at) for i in rows]
                values.append(torch.stack(seen))
                if references is None:
                    best.append(own.topk(forced.TOP))
                state.step(targets[:, at])
        # [step, sample, channel] and [step, sample, token]
        channels = torch.stack(values).tolist()
        ids = torch.stack([b.indices for b in best]).tolist() if best else None
        logprobs = torch.stack([b.values for b in best]).tolist() if best else None
        thoughts = []
        for i in rows:
            own_logprobs, agree, kl = (
                [step[i][channel] for step in channels]
                for channel in range(forced.CHANNELS)
            )
            made = None
            if ids and logprobs:
                made = forced.Reference([s[i] for s in ids], [s[i] for s in logprobs])
            thoughts.append(forced.Thoughts(own_logprobs, agree, kl, made))
        return thoughts
