"""Chains of variables and counts of words, after RULER (arXiv 2404.06654)."""

from __future__ import annotations

import random
import string

from bench.quality.tasks.filler import ESSAY_WORDS, fitted, noise_units, scatter
from bench.quality.tasks.sample import Draw, Sample
from bench.quality.tasks.words import random_code_word, vocabulary

HOPS = 4
COMMON = 10
TIMES, SHORT_TIMES = (30, 3), (10, 1)
"""How often the common words and the others come; in prompts under 4k tokens."""
FREQUENT = 3
ZIPF = 2.0
MAX_WORDS = 20_000


def _chain(rng: random.Random) -> tuple[str, list[str], list[str]]:
    """A value, the variables that have it, and the assignments in their order."""
    names: list[str] = []
    while len(names) < HOPS + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
    value = str(rng.randint(10_000, 99_999))
    lines = [f"VAR {names[0]} = {value}."]
    lines += [f"VAR {b} = VAR {a}." for a, b in zip(names, names[1:], strict=False)]
    return value, names, lines


def _ask(value: str) -> str:
    return f"Name all variables that hold the value {value} in the text above."


def _reply(value: str) -> str:
    return f"{HOPS + 1} variables hold the value {value}:"


def variables(draw: Draw) -> Sample:
    """Name the variables of one chain of assignments hidden in noise."""
    rng = draw.rng("example")
    value, names, lines = _chain(rng)
    text = scatter(noise_units(6), lines, rng)
    example = f"{text}\n\n{_ask(value)} {_reply(value)} {', '.join(names)}."
    intro = "Follow the chain of variable assignments hidden in the text."
    value, names, lines = _chain(draw.rng("chain"))
    question = _ask(value)

    def make(units: int) -> Sample:
        text = scatter(noise_units(units), lines, draw.rng("depths"))
        return draw.sample(
            prompt=f"{intro}\n\n{example}\n\n{intro}\n\n{text}\n\n{question}",
            answers=tuple(names),
            max_new_tokens=40,
            scorer="found",
            question=question,
            prefix=_reply(value),
        )

    return fitted(draw, make, ESSAY_WORDS)


def _word_list(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def common_words(draw: Draw) -> Sample:
    """Name the ten words of a list that come ten times as often as the others."""
    vocab = vocabulary(draw.corpus.essay_half(draw.seed))
    pool = draw.rng("words").sample(vocab, len(vocab))
    ask = "What are the 10 most common words in the list above?"

    def listing(common: list[str], others: list[str], each: tuple[int, int]) -> str:
        words = common * each[0] + others * each[1]
        draw.rng("shuffle").shuffle(words)
        return _word_list(words)

    intro = (
        "Below is a numbered list of words. Some words come more often than others. "
        "Memorize the ones that come most often."
    )
    example = listing(pool[:COMMON], pool[COMMON:30], (6, 1))
    reply = "The 10 most common words in the list are:"
    common, rest = pool[30:40], pool[40:]
    times = TIMES if draw.length >= 4096 else SHORT_TIMES

    def make(units: int) -> Sample:
        text = listing(common, rest[:units], times)
        prompt = f"{intro}\n{example}\n{ask} {reply} {_word_list(pool[:COMMON])}\n\n"
        return draw.sample(
            prompt=f"{prompt}{intro}\n{text}\n{ask}",
            answers=tuple(common),
            max_new_tokens=100,
            scorer="found",
            question=ask,
            prefix=reply,
        )

    return fitted(draw, make, len(rest))


def frequent_words(draw: Draw) -> Sample:
    """Name the three most frequent words of a coded text (Zipf's law)."""
    rng = draw.rng("words")
    words = [random_code_word(rng) for _ in range(2000)]
    weights = [1 / rank**ZIPF for rank in range(1, len(words) + 1)]
    text = rng.choices(words, weights, k=MAX_WORDS)
    question = (
        f"What are the {FREQUENT} most frequent words in the coded text above? The "
        "dots are no words."
    )

    def make(units: int) -> Sample:
        shown = text[:units]
        ranked = sorted(set(shown), key=lambda word: (-shown.count(word), word))
        return draw.sample(
            prompt="Read the following coded text and count how often each word "
            f"appears.\n\n{' ... '.join(shown)}\n\n{question}",
            answers=tuple(ranked[:FREQUENT]),
            max_new_tokens=40,
            scorer="found",
            question=question,
            prefix=f"The {FREQUENT} most frequent words are:",
        )

    return fitted(draw, make, MAX_WORDS)
