"""Prompts that hide a key at a depth of a long text, for `passkey`."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SENTENCES = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and "
    "back again. "
)
INTRO = (
    "There is important information hidden inside a lot of irrelevant text. Find it "
    "and memorize it.\n\n"
)
QUESTION = "\n\nWhat is the pass key? Answer with the number only."


@dataclass(frozen=True)
class Case:
    """One prompt and the key that it hides."""

    length: int
    depth: float
    key: str
    ids: list[int]


def filler_tokens(tokenizer: Any, text: str, count: int) -> list[int]:
    """First `count` tokens of the text, repeated if it is too short."""
    # Not its tokens: they merge differently at the seams, and the prompt would lose
    # one with every repetition.
    copies = 1 + count // len(text)
    while len(ids := tokenizer(text * copies)["input_ids"]) < count:
        copies *= 2
    return list(ids[:count])


def build_prompt(
    tokenizer: Any, filler: Sequence[int], length: int, depth: float, key: str
) -> list[int]:
    """Chat prompt of `length` tokens, give or take the seams of the filler.

    The key stands at `depth` of the filler, 0 is its start and 1 its end.
    """
    needle = f" The pass key is {key}. Remember it. {key} is the pass key. "

    def chat(before: str, after: str) -> list[int]:
        content = INTRO + before + needle + after + QUESTION
        ids: list[int] = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            return_dict=False,
        )
        return ids

    room = length - len(chat("", ""))
    if room < 0:
        raise ValueError(f"{length} tokens are too few for the question")
    cut = int(room * depth)
    return chat(tokenizer.decode(filler[:cut]), tokenizer.decode(filler[cut:room]))


def make_cases(args: argparse.Namespace, tokenizer: Any) -> list[Case]:
    """Every prompt of the run; its keys depend on the seed only."""
    text = args.filler_file.read_text() if args.filler_file else SENTENCES
    filler = filler_tokens(tokenizer, text, max(args.lengths))
    rng = random.Random(args.seed)
    return [
        Case(length, depth, key, build_prompt(tokenizer, filler, length, depth, key))
        for length in args.lengths
        for depth in args.depths
        for key in [str(rng.randrange(10_000, 99_999)) for _ in range(args.keys)]
    ]
