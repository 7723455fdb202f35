"""Answers and likelihoods of prompts that share the steps of their decoding."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from bench.quality import forced
from bench.quality.hf_decoding import Decoding, Prefilled
from bench.quality.tasks.sample import Sample, cut_at

TAIL = 16
"""Tokens in which a stop is looked for; it is a few tokens long."""


def generate(
    model: Any,
    tokenizer: Any,
    ends: Collection[int],
    prompts: Sequence[Prefilled],
    questions: Sequence[Sequence[int]],
    samples: Sequence[Sample],
) -> list[tuple[str, int]]:
    """Greedy answers, as text and number of tokens.

    Parameters
    ----------
    ends : collection of int
        Tokens that end an answer.
    questions : sequence of sequence of int
        Tokens that a prompt is fed before the model answers; may be none.
    samples : sequence of Sample
        Say how long an answer may be, and where it stops.
    """
    import torch

    said: list[list[int]] = [[] for _ in samples]
    running = set(range(len(samples)))
    steps = max(
        len(question) + sample.max_new_tokens
        for question, sample in zip(questions, samples, strict=True)
    )
    with torch.inference_mode(), Decoding(model, prompts, steps) as state:
        for at in range(steps):
            tokens = state.logits.argmax(-1).tolist()
            for i, question in enumerate(questions):
                if at < len(question):
                    tokens[i] = question[at]
                elif i in running and _ended(
                    tokenizer, ends, samples[i], said[i], tokens[i]
                ):
                    running.discard(i)
            if not running:
                break
            state.step(tokens)
    answers = []
    for sample, ids in zip(samples, said, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        answers.append((cut_at(text, sample.stop), len(ids)))
    return answers


def _ended(
    tokenizer: Any, ends: Collection[int], sample: Sample, said: list[int], token: int
) -> bool:
    """Take the token, unless the answer is over before it."""
    if token in ends:
        return True
    said.append(token)
    if len(said) >= sample.max_new_tokens:
        return True
    if not sample.stop:
        return False
    tail = tokenizer.decode(said[-TAIL:])
    return any(stop in tail for stop in sample.stop)


def think(
    model: Any,
    prompts: Sequence[Prefilled],
    samples: Sequence[Sample],
    references: Sequence[forced.Reference] | None,
) -> list[forced.Thoughts]:
    """What the model thinks of each sample's targets.

    Parameters
    ----------
    references : sequence of Reference or None
        The full cache's, one a sample. Without them, they are made.
    """
    import torch

    targets = [sample.targets for sample in samples]
    jobs = [
        forced.job(tokens, references[i] if references else None)
        for i, tokens in enumerate(targets)
    ]
    steps = max(map(len, targets))
    # Stays on the device until all is decoded.
    seen: list[Any] = []
    best: list[Any] = []
    with torch.inference_mode(), Decoding(model, prompts, steps) as state:
        for at in range(steps):
            own = state.logits.log_softmax(-1)
            going = _going(targets, at)
            some = [jobs[i] for i in going]
            seen.append(forced.observe(own[going], some, [at] * len(going)))
            if references is None:
                best.append(own.topk(forced.TOP))
            if at + 1 < steps:
                # A text that is over goes on with any token.
                state.step([t[min(at, len(t) - 1)] for t in targets])
    values: list[list[Any]] = [[] for _ in samples]
    for at, rows in enumerate(seen):
        for i, value in zip(_going(targets, at), rows.tolist(), strict=True):
            values[i].append(value)
    thoughts = []
    for rows in values:
        logprobs, agree, kl = (list(column) for column in zip(*rows, strict=True))
        thoughts.append(forced.Thoughts(logprobs, agree, kl))
    if references is None:
        made = _references(best, targets, thoughts)
        return [replace(t, reference=r) for t, r in zip(thoughts, made, strict=True)]
    return thoughts


def _going(targets: Sequence[Sequence[int]], at: int) -> list[int]:
    """Places of the texts that have a token there."""
    return [i for i, tokens in enumerate(targets) if at < len(tokens)]


def _references(
    best: Sequence[Any],
    targets: Sequence[Sequence[int]],
    thoughts: Sequence[forced.Thoughts],
) -> list[forced.Reference]:
    """Distributions of the texts, from the most likely tokens of each step."""
    import torch

    # [step, sample, token]
    ids = torch.stack([b.indices for b in best]).tolist()
    logprobs = torch.stack([b.values for b in best]).tolist()
    return [
        forced.refer(
            [step[i] for step in ids[: len(tokens)]],
            [step[i] for step in logprobs[: len(tokens)]],
            tokens,
            thoughts[i].logprobs,
        )
        for i, tokens in enumerate(targets)
    ]
