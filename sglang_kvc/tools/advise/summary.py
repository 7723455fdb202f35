"""From all answers to one row for each rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from sglang_kvc.tools.advise.asking import FULL, Answer, Run
from sglang_kvc.tools.advise.bootstrap import Estimate, retention
from sglang_kvc.tools.advise.prompts import Prompt
from sglang_kvc.tools.advise.scores import (
    REFERENCE_SCORERS,
    SHORT_WORDS,
    leading,
    likelihood,
)

LIKELIHOOD, AGREEMENT = "likelihood", "agreement"
AUTO = "auto"
SCORES = (AUTO, *REFERENCE_SCORERS, LIKELIHOOD, AGREEMENT)


@dataclass(frozen=True)
class Row:
    """What one rate does.

    Attributes
    ----------
    rate : `asking.FULL` for the full cache.
    kept : percent of the full cache's score, by name of the score.
    means : mean of each score.
    equal : share of answers that are the full cache's, token for token.
    logprob : mean log-probability of a token of the full cache's answers.
    resident, logical : mean tokens of memory, and of prompt and answer.
    speed : tokens per second, if measured.
    """

    rate: float
    kept: dict[str, Estimate | None]
    means: dict[str, float]
    equal: float
    logprob: float
    resident: float
    logical: float
    speed: float | None = None

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        kept = {name: it.as_record() if it else None for name, it in self.kept.items()}
        return {**vars(self), "kept": kept}


def rows_of(run: Run, speeds: Mapping[float, float]) -> list[Row]:
    """One row for each rate, the full cache's first."""
    return [
        _row(run, rate, answers, speeds.get(rate))
        for rate, answers in run.answers.items()
    ]


def main_score(asked: str, prompts: list[Prompt]) -> str:
    """The score that the advice is about.

    With references for all prompts it is theirs: whether a short one occurs, or how
    much of a long one is said. Without, the likelihood of the full cache's answers.
    """
    if asked != AUTO:
        return asked
    if not all(prompt.references for prompt in prompts):
        return LIKELIHOOD
    words = (len(one.split()) for prompt in prompts for one in prompt.references)
    return "contains" if max(words) <= SHORT_WORDS else "rouge_l"


def has_references(prompts: list[Prompt]) -> bool:
    """Whether every prompt has one."""
    return all(prompt.references for prompt in prompts)


def _row(run: Run, rate: float, answers: list[Answer], speed: float | None) -> Row:
    full = run.answers[FULL]
    pairs = {
        LIKELIHOOD: (
            [likelihood(a.logprobs) for a in answers],
            [likelihood(a.full_logprobs) for a in answers],
        ),
        AGREEMENT: (
            [leading(a.tokens, f.tokens) for a, f in zip(answers, full, strict=True)],
            [1.0] * len(answers),
        ),
    }
    if has_references(run.prompts):
        for name, score in REFERENCE_SCORERS.items():
            both = [
                [
                    score(a.text, p.references)
                    for a, p in zip(some, run.prompts, strict=True)
                ]
                for some in (answers, full)
            ]
            pairs[name] = (both[0], both[1])
    thoughts = [value for answer in answers for value in answer.logprobs]
    return Row(
        rate,
        {name: retention(*both) for name, both in pairs.items()},
        {name: fmean(both[0]) for name, both in pairs.items()},
        fmean(a.tokens == f.tokens for a, f in zip(answers, full, strict=True)),
        fmean(thoughts) if thoughts else 0.0,
        fmean(answer.resident for answer in answers),
        fmean(answer.logical for answer in answers),
        speed,
    )
