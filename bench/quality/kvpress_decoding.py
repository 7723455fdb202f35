"""Answers of prompts that share the steps of their decoding, and likelihoods."""

from __future__ import annotations

from collections.abc import Collection, Sequence
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
    """What the model thinks of each sample's targets, a prompt at a time.

    Parameters
    ----------
    references : sequence of Reference or None
        The full cache's, one a sample. Without them, they are made.
    """
    import torch

    thoughts = []
    with torch.inference_mode():
        for i, (prompt, sample) in enumerate(zip(prompts, samples, strict=True)):
            tokens = sample.targets
            own = _dictated(model, prompt, tokens).log_softmax(-1)
            job = forced.job(tokens, references[i] if references else None)
            places = range(len(tokens))
            rows = forced.observe(own, [job] * len(tokens), places).tolist()
            logprobs, agree, kl = (list(column) for column in zip(*rows, strict=True))
            reference = None
            if references is None:
                best = own.topk(forced.TOP)
                ids, values = best.indices.tolist(), best.values.tolist()
                reference = forced.refer(ids, values, tokens, logprobs)
            thoughts.append(forced.Thoughts(logprobs, agree, kl, reference))
    return thoughts


def _dictated(model: Any, prompt: Prefilled, tokens: Sequence[int]) -> Any:
    """Logits that each of the tokens was chosen from, [tokens, vocab].

    Nothing is evicted meanwhile, so they can be read at once; a row by itself, whose
    logits are as large as the cache of a prompt.
    """
    import torch

    first = prompt.logits[None]
    if len(tokens) == 1:
        return first
    with Decoding(model, [prompt], len(tokens)) as state:
        return torch.cat([first, state.read([tokens[:-1]])[0]])
