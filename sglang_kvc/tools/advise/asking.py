"""Every prompt with the full cache and at every rate.

Requests run side by side, but what is compared does not depend on how many: answers are
greedy, belong to their prompts in whatever order they come, and a request whose pass
had to wait for memory is asked again alone. What is left is rounding: a GPU's sums
differ a little with the size of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sglang_kvc.tools.advise import forced
from sglang_kvc.tools.advise.prompts import Prompt
from sglang_kvc.tools.advise.server import Server, ServerError

FULL = 1.0
"""The rate of the full cache."""
_TOP = 20
"""Most likely tokens that are asked for where an answer cannot be dictated."""


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt at one rate.

    Attributes
    ----------
    line : of the prompt, in its file.
    rate : `FULL` for the full cache.
    text, tokens : the greedy answer.
    prompt_tokens : length of the prompt.
    logical, resident : tokens of prompt and answer, and tokens of memory for them.
    deferred : passes that found no free pages, so that more was kept for a while.
    logprobs : of the full cache's answer under this cache, from the second token on.
    full_logprobs : of the same tokens under the full cache.
    """

    line: int
    rate: float
    text: str
    tokens: list[int]
    prompt_tokens: int
    logical: int
    resident: int
    deferred: int = 0
    logprobs: list[float] = field(default_factory=list)
    full_logprobs: list[float] = field(default_factory=list)

    def as_record(self) -> dict[str, Any]:
        """A line of the file of raw answers."""
        return asdict(self)


@dataclass(frozen=True)
class Run:
    """All answers.

    Attributes
    ----------
    answers : by rate, in the order of `prompts`; those of the full cache first.
    prompts : the prompts that were served at every rate.
    ids : their tokens.
    left_out : why the others were not.
    dictated : whether log-probabilities are of whole answers.
    """

    answers: dict[float, list[Answer]]
    prompts: list[Prompt]
    ids: list[list[int]]
    left_out: list[str]
    dictated: bool


class Asker:
    """Asks one server.

    Parameters
    ----------
    server : Server
    concurrency : most requests at once.
    max_new_tokens : of an answer.
    dictates : whether the server takes custom logit processors.
    done : called after every request with what came of it, if anything did.
    """

    def __init__(
        self,
        server: Server,
        *,
        concurrency: int,
        max_new_tokens: int,
        dictates: bool,
        done: Callable[[Answer | None], None] = lambda _answer: None,
    ) -> None:
        self.server, self.concurrency = server, concurrency
        self.max_new_tokens, self.done = max_new_tokens, done
        self._said = forced.processor() if dictates else None

    def run(self, prompts: Sequence[Prompt], rates: Iterable[float]) -> Run:
        """Ask everything.

        Raises
        ------
        ServerError
            If no prompt was served, or the server does not compress.
        """
        left_out: dict[int, str] = {}
        with ThreadPoolExecutor(self.concurrency) as pool:

            def each(ask: Callable[[int], Any]) -> dict[int, Any]:
                """What `ask` says of every prompt that is still in."""

                def safely(place: int) -> Any:
                    try:
                        return ask(place)
                    except ServerError as error:
                        left_out[place] = f"line {prompts[place].line}: {error}"
                        self.done(None)
                        return None

                places = [i for i in range(len(prompts)) if i not in left_out]
                found = zip(places, pool.map(safely, places), strict=True)
                return {place: it for place, it in found if place not in left_out}

            ids = each(lambda i: self.server.tokens_of(prompts[i]))
            full = each(lambda i: self.full(prompts[i], ids[i]))
            answers = {FULL: full}
            for rate in rates:

                def at_rate(i: int, rate: float = rate) -> Answer:
                    return self.compressed(prompts[i], ids[i], rate, full[i])

                answers[rate] = each(at_rate)
                for i, answer in answers[rate].items():
                    # Side by side with nobody, a pass finds its pages.
                    if answer.deferred:
                        answers[rate][i] = at_rate(i)
        kept = [i for i in range(len(prompts)) if i not in left_out]
        if not kept:
            reasons = "; ".join(list(left_out.values())[:2])
            raise ServerError(f"no prompt was served: {reasons}")
        return Run(
            {rate: [some[i] for i in kept] for rate, some in answers.items()},
            [prompts[i] for i in kept],
            [ids[i] for i in kept],
            [left_out[i] for i in sorted(left_out)],
            self._said is not None,
        )

    def full(self, prompt: Prompt, ids: list[int]) -> Answer:
        """The full cache's answer."""
        output = self._send(ids, {"enabled": False}, {"return_logprob": True})
        logprobs = [entry[0] for entry in output["meta_info"]["output_token_logprobs"]]
        answer = self._answer(prompt, FULL, ids, output)
        own = logprobs[forced.BEFORE_EVICTION :]
        answer = replace(answer, logprobs=own, full_logprobs=own)
        self.done(answer)
        return answer

    def compressed(
        self, prompt: Prompt, ids: list[int], rate: float, full: Answer
    ) -> Answer:
        """The answer at a rate, and what it thinks of the full cache's."""
        free = self._said is None
        fields = {"return_logprob": True, "top_logprobs_num": _TOP} if free else {}
        output = self._send(ids, {"rate": rate}, fields)
        answer = self._answer(prompt, rate, ids, output)
        logprobs: list[float] = []
        if self._said is None:
            logprobs = forced.until_difference(output, full.tokens)
        elif full.tokens:
            fields = forced.fields(self._said)
            output = self._send(ids, {"rate": rate}, fields, dictate=full.tokens)
            logprobs = forced.logprobs_of(output, full.tokens)
            late = output["meta_info"]["kv_compress"]["deferred_passes"]
            answer = replace(answer, deferred=answer.deferred + late)
        own = logprobs[forced.BEFORE_EVICTION :]
        answer = replace(answer, logprobs=own, full_logprobs=full.logprobs[: len(own)])
        self.done(answer)
        return answer

    def _send(
        self,
        ids: list[int],
        kv: dict[str, Any],
        fields: Mapping[str, Any],
        dictate: list[int] | None = None,
    ) -> dict[str, Any]:
        params = {
            "temperature": 0,
            "max_new_tokens": len(dictate) if dictate else self.max_new_tokens,
            "ignore_eos": bool(dictate),
            "custom_params": {"kv_compress": kv},
        }
        if dictate:
            params["custom_params"] = {"kv_compress": kv, forced.KEY: dictate}
        body = {"input_ids": ids, "sampling_params": params, **fields}
        output = self.server.generate(body)
        if output["meta_info"].get("kv_compress") is None:
            raise ServerError(
                "the server answers without meta_info.kv_compress; start it with "
                "--kv-compress"
            )
        return output

    def _answer(
        self, prompt: Prompt, rate: float, ids: list[int], output: dict[str, Any]
    ) -> Answer:
        kv = output["meta_info"]["kv_compress"]
        return Answer(
            prompt.line,
            rate,
            output["text"],
            list(output["output_ids"]),
            len(ids),
            kv["logical_tokens"],
            kv["resident_tokens"],
            kv["deferred_passes"],
        )
