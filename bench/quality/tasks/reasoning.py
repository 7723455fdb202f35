"""Problems with long answers: what is evicted here is evicted while decoding.

Their prompts have the length they have; `length` only names the cell. Give a budget
in tokens instead of a rate to see decode-time eviction alone.
"""

from __future__ import annotations

import re
from typing import Any

from bench.quality.tasks.corpus import half
from bench.quality.tasks.sample import Draw, Sample

SHOTS = 5
SHOT_POOL = 20
"""Problems at the end of the file that serve as shots only."""
STEPS_TOKENS = 400
PROOF_TOKENS = 1024
TOGETHER, TOGETHER_TOKENS = 4, 1600
LONG_TOKENS = 2000


def number_after_hashes(answer: str) -> str:
    """The gold number of a GSM8K answer."""
    return answer.rsplit("####", 1)[-1].strip().replace(",", "")


def _worked(problem: dict[str, Any]) -> str:
    steps = re.sub(r"<<.*?>>", "", problem["answer"].rsplit("####", 1)[0]).strip()
    return (
        f"Question: {problem['question']}\nAnswer: {steps}\n"
        f"The answer is {number_after_hashes(problem['answer'])}."
    )


def _problem(draw: Draw) -> dict[str, Any]:
    own = half(draw.corpus.gsm8k[:-SHOT_POOL], draw.seed)
    return own[draw.index % len(own)]


def gsm8k(draw: Draw) -> Sample:
    """Five worked problems, then one to solve."""
    pool = half(draw.corpus.gsm8k[-SHOT_POOL:], draw.seed)
    shots = "\n\n".join(_worked(problem) for problem in pool[:SHOTS])
    problem = _problem(draw)
    question = f"Question: {problem['question']}"
    return draw.sample(
        prompt=f"{shots}\n\nNow solve this one in the same way.\n\n{question}",
        answers=(number_after_hashes(problem["answer"]),),
        max_new_tokens=STEPS_TOKENS,
        scorer="last_number",
        question=question,
        prefix="Answer:",
        stop=("Question:",),
    )


def gsm8k_steps(draw: Draw) -> Sample:
    """A problem without an example, to be solved step by step."""
    problem = _problem(draw)
    question = (
        f"{problem['question']}\nThink step by step, then give the final number after "
        "'The answer is'."
    )
    return draw.sample(
        prompt=question,
        answers=(number_after_hashes(problem["answer"]),),
        max_new_tokens=2 * STEPS_TOKENS,
        scorer="last_number",
        question=question,
    )


def gsm8k_four(draw: Draw) -> Sample:
    """Four problems in one answer, step by step: it is long whatever the model."""
    own = half(draw.corpus.gsm8k[:-SHOT_POOL], draw.seed)
    some = [own[(TOGETHER * draw.index + k) % len(own)] for k in range(TOGETHER)]
    text = "\n\n".join(f"Problem {k}: {p['question']}" for k, p in enumerate(some, 1))
    question = (
        "Solve all problems, one after the other. Think step by step in each, and end "
        "each with a line like 'Answer 1: 42', with the problem's number and the final "
        "number."
    )
    return draw.sample(
        prompt=f"{text}\n\n{question}",
        answers=tuple(number_after_hashes(problem["answer"]) for problem in some),
        max_new_tokens=TOGETHER_TOKENS,
        scorer="numbered",
        question=question,
    )


def math_long(draw: Draw) -> Sample:
    """A competition problem with room for 2,000 tokens, and a request to use it."""
    how = (
        "Think step by step. Explain every step, then solve the problem once more in "
        "another way to check the result. At the end put the final answer in \\boxed{}."
    )
    return _competition(draw, how, LONG_TOKENS, "math")


def math500(draw: Draw) -> Sample:
    """A competition problem; the answer stands in a box."""
    how = "Think step by step and put the final answer in \\boxed{}."
    return _competition(draw, how, PROOF_TOKENS, "boxed")


def _competition(draw: Draw, how: str, tokens: int, scorer: str) -> Sample:
    own = half(draw.corpus.math, draw.seed)
    problem = own[draw.index % len(own)]
    question = f"{problem['problem']}\n\n{how}"
    return draw.sample(
        prompt=question,
        answers=(problem["answer"],),
        max_new_tokens=tokens,
        scorer=scorer,
        question=question,
    )
