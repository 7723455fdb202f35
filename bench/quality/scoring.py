"""Make the recorded result of a sample and its answer."""

from __future__ import annotations

from typing import Any

from bench.quality import forced, long_answers, metrics
from bench.quality.asking import Answer
from bench.quality.records import ANSWER_CHARS
from bench.quality.tasks.sample import Sample

# The first token follows the prompt itself, before anything is evicted.
BEFORE_EVICTION = 1
LONG = ("long", "lists")
"""Groups whose answers are looked at closer."""


def result(sample: Sample, answer: Answer) -> dict[str, Any]:
    """The recorded result: ``score`` in [0, 1] and what explains it."""
    record: dict[str, Any] = {
        "index": sample.index,
        "prompt_tokens": answer.prompt_tokens,
        "output_tokens": answer.output_tokens,
        "resident": answer.resident,
        "mean_resident": answer.mean_resident,
    }
    if answer.resumed is not None:
        record["resumed"] = answer.resumed
    if sample.scorer == metrics.LIKELIHOOD:
        return record | _likelihood(answer.thoughts)
    gold = answer.gold or sample.answers
    score = metrics.SCORERS[sample.scorer](answer.text, gold)
    if sample.group in LONG:
        record |= long_answers.figures(answer.text, gold, sample.prompt)
    wrong = answer.text[:ANSWER_CHARS] if score < 1 else None
    return record | {"score": score, "answer": wrong}


def _likelihood(thoughts: forced.Thoughts | None) -> dict[str, Any]:
    """Likelihood of the decoded text; agreement and divergence from the full cache."""
    if thoughts is None:
        raise ValueError("a likelihood needs log-probabilities")
    logprobs = thoughts.logprobs[BEFORE_EVICTION:]
    agree = thoughts.agree[BEFORE_EVICTION:]
    divergence = thoughts.divergence[BEFORE_EVICTION:]
    count = max(1, len(logprobs))
    return {
        "score": forced.likelihood(logprobs),
        "tokens": len(logprobs),
        "nll": -sum(logprobs) / count,
        "agree": sum(agree) / count,
        "kl": sum(divergence) / count,
    }
