"""Batches of samples through ``sglang.Engine``.

One engine serves every setting, as an option of the request. Greedy; tokens in. A
prompt that was served before is a prefix hit: SGLang's tree holds it uncompressed and
a hit ends before the observed window, so what is kept does not depend on it (systems
for which that is not so flush the tree between batches).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.quality import forced
from bench.quality.engines import start
from bench.quality.systems import FULL, OURS, Setting, System
from bench.quality.tasks.sample import (
    ASK,
    CONVERSATION,
    DICTATED,
    LIKELIHOOD,
    TURNS,
    Sample,
    SampleKey,
    encode,
    encode_parts,
    encode_said,
    encode_turns,
    text_ids,
)

TURN_REPLY = "I have read it. What do you want to know?"


@dataclass(frozen=True)
class Answer:
    """What came back for one sample.

    `resident` tokens of a KV head on average are held at the end, `mean_resident` over
    all decode steps. `gold` is the full cache's answer where that is the one to give;
    `resumed` are tokens of the prompt that came from a snapshot.
    """

    text: str
    prompt_tokens: int
    output_tokens: int = 0
    resident: int | None = None
    mean_resident: float | None = None
    thoughts: forced.Thoughts | None = None
    gold: tuple[str, ...] = ()
    resumed: int | None = None


@dataclass(frozen=True)
class Request:
    """One prompt as it is sent."""

    ids: list[int]
    max_new: int
    stop: tuple[str, ...] = ()
    dictate: dict[str, Any] | None = None
    ignore_eos: bool = False


class EngineAsker:
    """Asks one system.

    Parameters
    ----------
    system : System
        ``stock`` or ``ours``.
    model : str
        Folder of the model.
    tokenizer
        The model's.
    engine : optional
        In place of a new ``sglang.Engine``.
    extra : dict, optional
        Further keywords of the engine.
    """

    def __init__(
        self,
        system: System,
        model: str,
        tokenizer: Any,
        engine: Any = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        self.system, self.tokenizer = system, tokenizer
        # By sample: the text to decode and the full cache's distribution over it.
        self._full: dict[SampleKey, tuple[Sample, Any]] = {}
        self.engine = engine or start(system, model, extra or {})

    def close(self) -> None:
        """Stop the engine."""
        self.engine.shutdown()

    def answer(self, samples: Sequence[Sample], setting: Setting) -> list[Answer]:
        """Answers to samples of any modes, in their order."""
        if not self.system.reuses_prefixes:
            self.flush()
        samples = self.completed(samples)
        answers: dict[int, Answer] = {}
        for mode, ask in (
            (ASK, self._ask),
            (TURNS, self._turns),
            (DICTATED, self._dictated),
            (LIKELIHOOD, self._likelihood),
            (CONVERSATION, self._conversations),
        ):
            places = [i for i, sample in enumerate(samples) if sample.mode == mode]
            if places:
                some = ask([samples[i] for i in places], setting)
                answers |= dict(zip(places, some, strict=True))
        return [with_gold(samples[i], answers[i]) for i in range(len(samples))]

    def flush(self) -> None:
        """Empty the prefix cache; the last step may still be running."""
        for _ in range(100):
            if self.engine.flush_cache().success:
                return
            time.sleep(0.1)
        raise RuntimeError("the engine does not become idle")

    def completed(self, samples: Sequence[Sample]) -> list[Sample]:
        """Samples whose text comes from the full cache, with that text filled in."""
        new = [s for s in samples if s.from_full and s.key not in self._full]
        if new:
            for sample, answer in zip(new, self._ask(new, FULL), strict=True):
                filled = with_full_text(sample, answer.text, self.tokenizer)
                self._full[sample.key] = (filled, None)
        return [self._full[s.key][0] if s.from_full else s for s in samples]

    def _ask(self, samples: Sequence[Sample], setting: Setting) -> list[Answer]:
        requests = [
            Request(encode(self.tokenizer, s), s.max_new_tokens, s.stop)
            for s in samples
        ]
        return self._answers(requests, setting)

    def _turns(self, samples: Sequence[Sample], setting: Setting) -> list[Answer]:
        pairs = [encode_turns(self.tokenizer, s, TURN_REPLY) for s in samples]
        self._send([Request(context, 1) for context, _ in pairs], setting)
        requests = [
            Request(ids, s.max_new_tokens, s.stop)
            for (_, ids), s in zip(pairs, samples, strict=True)
        ]
        return self._answers(requests, setting)

    def _conversations(
        self, samples: Sequence[Sample], setting: Setting
    ) -> list[Answer]:
        """Turn by turn, all conversations at once; the last turn is answered freely."""
        talks = [encode_said(self.tokenizer, s) for s in samples]
        for turn in range(max(len(talk) // 2 for talk in talks)):
            requests = []
            for talk in (one for one in talks if turn < len(one) // 2):
                *read, reply = talk[: 2 * turn + 2]
                dictate = forced.job(reply)
                history = list(chain(*read))
                requests.append(Request(history, len(reply), (), dictate, True))
            outputs = self._send(requests, setting)
            for output, request in zip(outputs, requests, strict=True):
                _check_dictation(output, request)
        requests = [
            Request(list(chain(*talk)), s.max_new_tokens, s.stop)
            for talk, s in zip(talks, samples, strict=True)
        ]
        return self._answers(requests, setting)

    def _dictated(self, samples: Sequence[Sample], setting: Setting) -> list[Answer]:
        requests = []
        for sample in samples:
            context, question = encode_parts(self.tokenizer, sample)
            # The question ends the user's turn with a token that would end the answer.
            requests.append(
                Request(
                    context,
                    len(question) + sample.max_new_tokens,
                    dictate=forced.job(question),
                    ignore_eos=True,
                )
            )
        outputs = self._send(requests, setting)
        return [
            _answer(output, self._after_dictation(output, request), request)
            for output, request in zip(outputs, requests, strict=True)
        ]

    def _after_dictation(self, output: dict[str, Any], request: Request) -> str:
        ids = output["output_ids"][_check_dictation(output, request) :]
        if (end := self.tokenizer.eos_token_id) in ids:
            ids = ids[: ids.index(end)]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _likelihood(self, samples: Sequence[Sample], setting: Setting) -> list[Answer]:
        new = [s for s in samples if self._reference(s) is None]
        if new:
            for sample, answer in zip(new, self._decode(new, FULL, True), strict=True):
                assert answer.thoughts
                self._full[sample.key] = (sample, answer.thoughts.reference)
        return self._decode(samples, setting, False)

    def _reference(self, sample: Sample) -> forced.Reference | None:
        return self._full.get(sample.key, (sample, None))[1]

    def _decode(
        self, samples: Sequence[Sample], setting: Setting, keep: bool
    ) -> list[Answer]:
        with TemporaryDirectory() as folder:
            requests = [
                Request(
                    encode(self.tokenizer, s),
                    len(s.targets),
                    dictate=forced.job(
                        s.targets,
                        None if keep else self._reference(s),
                        Path(folder, f"{number}.json"),
                    ),
                    ignore_eos=True,
                )
                for number, s in enumerate(samples)
            ]
            outputs = self._send(requests, setting)
            answers = []
            for output, request in zip(outputs, requests, strict=True):
                _check_dictation(output, request)
                thoughts = forced.read(request.dictate)
                answers.append(replace(_answer(output, "", request), thoughts=thoughts))
        return answers

    def _answers(self, requests: list[Request], setting: Setting) -> list[Answer]:
        outputs = self._send(requests, setting)
        return [
            _answer(output, output["text"], request)
            for output, request in zip(outputs, requests, strict=True)
        ]

    def _send(self, requests: list[Request], setting: Setting) -> list[dict[str, Any]]:
        keywords: dict[str, Any] = {
            "input_ids": [request.ids for request in requests],
            "sampling_params": [self._params(r, setting) for r in requests],
        }
        if any(request.dictate for request in requests):
            keywords["custom_logit_processor"] = forced.processor()
        outputs: list[dict[str, Any]] = self.engine.generate(**keywords)
        for output in outputs:
            reason = output["meta_info"]["finish_reason"]
            if reason and reason["type"] == "abort":
                raise RuntimeError(f"a request was refused: {reason}")
        return outputs

    def _params(self, request: Request, setting: Setting) -> dict[str, Any]:
        custom: dict[str, Any] = {}
        if self.system.kind == OURS:
            full = setting == FULL
            custom["kv_compress"] = {"enabled": False} if full else setting.option
        if request.dictate:
            custom[forced.KEY] = request.dictate
        params: dict[str, Any] = {
            "temperature": 0.0,
            "max_new_tokens": request.max_new,
            "ignore_eos": request.ignore_eos,
        }
        if custom:
            params["custom_params"] = custom
        if request.stop:
            params["stop"] = list(request.stop)
        return params


def _check_dictation(output: dict[str, Any], request: Request) -> int:
    """Tokens that were dictated; raises if others came."""
    assert request.dictate
    wanted = request.dictate["tokens"]
    if list(output["output_ids"][: len(wanted)]) != wanted:
        raise RuntimeError("the engine did not follow the dictation")
    return len(wanted)


def with_full_text(sample: Sample, text: str, tokenizer: Any) -> Sample:
    """The sample with the full cache's answer filled in."""
    # A model that says nothing is asked how likely its silence still is.
    ids = text_ids(tokenizer, text) or [tokenizer.eos_token_id] * 2
    return replace(sample, answers=(text,), targets=tuple(ids))


def with_gold(sample: Sample, answer: Answer) -> Answer:
    """The answer, with the text to compare it with if that is the full cache's."""
    return replace(answer, gold=sample.answers) if sample.from_full else answer


def _answer(output: dict[str, Any], text: str, request: Request) -> Answer:
    meta = output["meta_info"]
    info = meta.get("kv_compress") or {}
    return Answer(
        text,
        len(request.ids),
        len(output["output_ids"]),
        info.get("resident_tokens"),
        info.get("mean_resident_tokens"),
        resumed=info.get("resumed_tokens"),
    )
