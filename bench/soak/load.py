"""List of the soak's requests, which follows from a seed alone.

Request `i` depends on the seed, the limits of the server and `i`; not on time, and not
on what became of the requests before it.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.common.job import EITHER, OK, REFUSED, REGEX, Job
from bench.soak.hostile import HOSTILE, Hostile
from bench.soak.limits import Limits, surely_fits
from bench.soak.shape import (
    BEYOND_SHARE,
    BUDGETS,
    DOCUMENTS,
    HOSTILE_SHARE,
    RATES,
    SCHEMA,
    STRUCTURED_SHARE,
    WORDS,
    Shape,
    log_uniform,
)


@dataclass
class Load:
    """The requests of one soak.

    Parameters
    ----------
    shape : Shape
    limits : Limits
    """

    shape: Shape
    limits: Limits
    _tokens: list[int] = field(init=False, repr=False)
    _words: list[str] = field(init=False, repr=False)
    _documents: list[list[int]] = field(init=False, repr=False)
    _roles: list[str] = field(init=False, repr=False)
    _hostile: list[Hostile] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Draw the documents and who plays which role."""
        shape, rng = self.shape, random.Random(f"{self.shape.seed}:all")
        low, vocab = min(100, self.limits.vocab // 4), self.limits.vocab
        self._words = WORDS.split()
        self._tokens = rng.choices(range(low, vocab), k=2 * shape.max_len + 20_000)
        self._documents = [
            rng.choices(range(low, vocab), k=max(shape.max_len >> (d % 4), 4))
            for d in range(DOCUMENTS)
        ]
        wanted = [h for h in HOSTILE if h.kind not in shape.without]
        if self.limits.text:
            wanted = [h for h in wanted if not h.only_bare]
        self._hostile = wanted
        roles = ["abort"] * shape.aborts + ["leave"] * shape.leaves
        small = self.limits.pool < 0.8 * self.limits.context
        for role, share, possible in (
            ("hostile", HOSTILE_SHARE, bool(wanted) and not shape.stock),
            ("structured", STRUCTURED_SHARE, self.limits.structured),
            ("beyond", BEYOND_SHARE, small and not shape.stock),
        ):
            if possible and role not in shape.without:
                roles += [role] * math.ceil(share * shape.requests)
        roles += [""] * (shape.requests - len(roles))
        rng.shuffle(roles)
        self._roles = roles[: shape.requests]

    def left_out(self) -> list[str]:
        """What this server cannot be asked, in words."""
        limits, words = self.limits, sorted(self.shape.without)
        if not limits.text:
            words += ["OpenAI API (no tokenizer)"]
        if not limits.structured:
            words += ["JSON and regex"]
        if not limits.priority:
            words += ["priorities"]
        if "beyond" not in self._roles:
            words += ["prompts beyond the pool"]
        return words

    def job(self, index: int) -> Job:
        """Request `index`."""
        rng = random.Random(f"{self.shape.seed}:{index}")
        role = self._roles[index]
        if role == "hostile":
            return self._hostile_job(index, rng)
        if role == "structured":
            return self._structured(index, rng)
        if role == "beyond":
            return self._beyond(index, rng)
        if role in ("abort", "leave"):
            return self._cut_short(index, rng, role)
        return self._ordinary(index, rng)

    def canary(self, number: int) -> Job:
        """A small streamed request whose latency is measured."""
        rng = random.Random(f"{self.shape.seed}:canary:{number}")
        output = min(16, self.shape.max_output)
        body = self._native(rng, self._fresh(rng, 32), output, None, True)
        body["rid"] = rid = f"canary-{number:08d}"
        job = {"kind": "canary", "path": "/generate", "stream": True}
        job |= {"output": output, "exact": True, "expect": OK}
        return Job(index=-1 - number, body=body, rid=rid, **job)

    def _fresh(self, rng: random.Random, length: int) -> list[int]:
        """Tokens that nobody else begins with."""
        start = rng.randrange(len(self._tokens) - length) if length else 0
        ids = self._tokens[start : start + length]
        ids[:2] = rng.choices(self._tokens, k=min(2, length))
        return ids

    def _prompt(self, rng: random.Random, length: int) -> list[int]:
        """Draw a prompt: half of them are (a part of) a document, and a question."""
        document = self._documents[rng.randrange(DOCUMENTS)]
        cuts = [len(document) * k // 4 for k in (1, 2, 3, 4)]
        cuts = [cut for cut in cuts if cut < length]
        if not cuts or rng.random() < 0.5:
            return self._fresh(rng, length)
        cut = rng.choice(cuts)
        question = min(length - cut, log_uniform(rng, 1, 64))
        return document[:cut] + self._fresh(rng, question)

    def _option(self, rng: random.Random, length: int) -> dict[str, Any] | None:
        draw = rng.random()
        if draw < 0.3 or self.shape.stock:
            return None
        if draw < 0.65:
            return {"rate": rng.choice(RATES)}
        if draw < 0.85:
            return {"budget": rng.choice((*BUDGETS, max(length, 64)))}
        if draw < 0.93:
            return {"enabled": False}
        told = {"report_heads": True}, {"rate": 8, "report_tokens": True}
        late = {"rate": 8, "delay": 32}
        return rng.choice((*told, {"rate": 8, "answer": 64}, late))

    def _native(
        self,
        rng: random.Random,
        ids: Sequence[int],
        output: int,
        option: dict[str, Any] | None,
        stream: bool,
    ) -> dict[str, Any]:
        params: dict[str, Any] = {
            "temperature": rng.choice((0, 0, 0.8)),
            "max_new_tokens": output,
            "ignore_eos": True,
        }
        if option is not None:
            params["custom_params"] = {"kv_compress": option}
        return {"input_ids": list(ids), "sampling_params": params, "stream": stream}

    def _finish(
        self, index: int, rng: random.Random, job: dict[str, Any], body: dict[str, Any]
    ) -> Job:
        """Add id and priority.

        SGLang aborts every id that starts with the one given: all are equally long.
        """
        rid = f"soak-{index:08d}"
        body["rid"] = rid
        if self.limits.priority:
            body["priority"] = rng.randrange(4)
        return Job(index=index, body=body, rid=rid, **job)

    def _ordinary(self, index: int, rng: random.Random) -> Job:
        length = log_uniform(rng, 1, self.shape.max_len)
        output = log_uniform(rng, 1, self.shape.max_output + 1) - 1
        option = self._option(rng, length)
        stream = rng.random() < 0.5
        api = rng.choices(("native", "completions", "chat"), (70, 15, 15))[0]
        if not self.limits.text or api in self.shape.without:
            api = "native"
        if api != "native":
            return self._openai(index, rng, api, length, output, option, stream)
        ids = self._prompt(rng, length)
        body = self._native(rng, ids, output, option, stream)
        n = rng.randint(2, 4) if rng.random() < 0.1 and length < 2048 else 1
        if n > 1 and "n>1" not in self.shape.without:
            body["sampling_params"] |= {"n": n, "temperature": 0.8}
        else:
            n = 1
        sure = surely_fits(self.limits, len(ids), output, option)
        kind = f"generate{' n>1' if n > 1 else ''}{' stream' if stream else ''}"
        job = {"kind": kind, "path": "/generate", "stream": stream, "output": output}
        job |= {"n": n, "exact": sure, "expect": OK if sure else EITHER}
        return self._finish(index, rng, job, body)

    def _openai(
        self,
        index: int,
        rng: random.Random,
        api: str,
        length: int,
        output: int,
        option: dict[str, Any] | None,
        stream: bool,
    ) -> Job:
        output = max(output, 1)
        body: dict[str, Any] = {"model": "default", "stream": stream, "temperature": 0}
        body |= {"max_tokens": output, "ignore_eos": True}
        if option is not None:
            body["custom_params"] = {"kv_compress": option}
        text = " ".join(rng.choices(self._words, k=max(length * 2 // 3, 1)))
        if api == "chat":
            body["messages"] = [{"role": "user", "content": text}]
            body["return_meta_info"] = not stream
        else:
            body["prompt"] = text
        # Words may be more than a token, and the chat frame some forty.
        sure = surely_fits(self.limits, length + 64, output, option)
        path = "/v1/chat/completions" if api == "chat" else "/v1/completions"
        kind = f"{api}{' stream' if stream else ''}"
        job = {"kind": kind, "path": path, "stream": stream, "output": output}
        job |= {"expect": OK if sure else EITHER}
        return self._finish(index, rng, job, body)

    def _cut_short(self, index: int, rng: random.Random, act: str) -> Job:
        """Make a request that is aborted by id, or left, before or after tokens."""
        length = log_uniform(rng, 1, self.shape.max_len)
        output, option = self.shape.max_output, self._option(rng, length)
        stream = rng.random() < 0.7
        ids = self._prompt(rng, length)
        body = self._native(rng, ids, output, option, stream)
        sure = surely_fits(self.limits, len(ids), output, option)
        job: dict[str, Any] = {"kind": act, "path": "/generate", "stream": stream}
        job |= {"output": output, "act": act, "expect": OK if sure else EITHER}
        if stream and rng.random() < 0.6:
            job["after_events"] = rng.randint(1, max(min(16, output // 2), 1))
        else:
            job["after_seconds"] = rng.uniform(0.01, 0.8)
        return self._finish(index, rng, job, body)

    def _beyond(self, index: int, rng: random.Random) -> Job:
        """A prompt longer than the pool, at rates that make it fit in parts."""
        output = min(32, self.shape.max_output)
        most = min(int(1.5 * self.limits.pool), self.limits.context - output - 2)
        length = rng.randint(min(int(1.02 * self.limits.pool), most), most)
        option = {"rate": rng.choice((8, 16, 64))}
        copies = -(-length // (len(self._tokens) - 1))
        ids = self._fresh(rng, 2) + (self._tokens * copies)[: length - 2]
        body = self._native(rng, ids, output, option, False)
        sure = surely_fits(self.limits, length, output, option)
        job = {"kind": "beyond the pool", "path": "/generate", "output": output}
        job |= {"exact": sure, "expect": OK if sure else EITHER}
        return self._finish(index, rng, job, body)

    def _structured(self, index: int, rng: random.Random) -> Job:
        text = " ".join(rng.choices(self._words, k=log_uniform(rng, 4, 200)))
        pattern = rng.choice(("json", "regex"))
        params: dict[str, Any] = {"temperature": 0, "max_new_tokens": 64}
        if pattern == "json":
            params["json_schema"] = json.dumps(SCHEMA)
        else:
            params["regex"] = REGEX
        if option := self._option(rng, 100):
            params["custom_params"] = {"kv_compress": option}
        body = {"text": text, "sampling_params": params}
        job = {"kind": f"structured {pattern}", "path": "/generate", "pattern": pattern}
        return self._finish(index, rng, {**job, "output": 64}, body)

    def _hostile_job(self, index: int, rng: random.Random) -> Job:
        hostile = rng.choice(self._hostile)
        stream = hostile.streams and rng.random() < 0.3
        ids = self._fresh(rng, rng.randint(1, 64))
        body = self._native(rng, ids, 8, None, stream)
        body["rid"] = rid = f"soak-{index:08d}"
        raw = hostile.spoil(body, self.limits)
        return Job(
            index,
            f"hostile: {hostile.kind}",
            "/generate",
            raw,
            REFUSED,
            stream,
            8,
            short=hostile.short,
            rid=rid,
        )
