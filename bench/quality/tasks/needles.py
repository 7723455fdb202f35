"""Retrieval of keys' values from a long text, after RULER (arXiv 2404.06654)."""

from __future__ import annotations

from dataclasses import dataclass

from bench.quality.tasks.filler import (
    ESSAY_WORDS,
    essay_passage,
    fitted,
    noise_units,
    scatter,
)
from bench.quality.tasks.sample import Draw, Sample
from bench.quality.tasks.words import distinct

NAMES = {"words": "word pair", "numbers": "number", "pins": "number", "uuids": "uuid"}
VALUE_TOKENS = {"words": 8, "numbers": 12, "pins": 8, "uuids": 40}
ESSAY, NOISE, NEEDLES = "essay", "noise", "needles"
MANY = 1200
"""Most needles that stand in for a haystack."""


@dataclass(frozen=True)
class Needles:
    """A kind of needle task.

    Attributes
    ----------
    hay : {"essay", "noise", "needles"}
        What hides the needles; "needles": other keys, one a line.
    keys, values : str
        Kinds of `bench.quality.tasks.words.MAKERS`.
    others : int
        Keys that are not asked for, in an essay or noise.
    per_key : int
        Values of each key.
    asked : int
        Keys that are asked for.
    """

    hay: str = ESSAY
    keys: str = "words"
    values: str = "numbers"
    others: int = 0
    per_key: int = 1
    asked: int = 1

    def __call__(self, draw: Draw) -> Sample:
        """Build one question; random parts do not depend on the amount of filler."""
        rng = draw.rng("needles")
        hidden = MANY if self.hay == NEEDLES else self.others
        keys = distinct(self.keys, self.asked + hidden, rng)
        values = distinct(self.values, len(keys) * self.per_key, rng)
        kind = NAMES[self.values]
        pairs = [
            (key, values[i * self.per_key + j])
            for i, key in enumerate(keys)
            for j in range(self.per_key)
        ]
        lines = [f"The secret {kind} of {key} is: {value}." for key, value in pairs]
        count = self.asked * self.per_key
        wanted = keys[: self.asked]
        answers = tuple(value for _, value in pairs[:count])
        order = draw.rng("order")
        if self.hay == NEEDLES:
            shown, rest, joint = lines[:count], lines[count:], "\n"
        else:
            shown, joint = lines, " "
            rest = (
                essay_passage(draw) if self.hay == ESSAY else noise_units(ESSAY_WORDS)
            )
        order.shuffle(shown)
        depths = order.getstate()
        intro, question, prefix = self._frame(kind, wanted)

        def make(units: int) -> Sample:
            order.setstate(depths)
            text = scatter(rest[:units], shown, order, joint)
            return draw.sample(
                prompt=f"{intro}\n\n{text}\n\n{question}",
                answers=answers,
                max_new_tokens=VALUE_TOKENS[self.values] * count + 8,
                scorer="found",
                question=question,
                prefix=prefix,
            )

        return fitted(draw, make, len(rest))

    def _frame(self, kind: str, wanted: list[str]) -> tuple[str, str, str]:
        """Words before and after the text, and those that the answer begins with."""
        names = ", ".join(wanted)
        many = self.asked * self.per_key > 1
        verb, plural = ("are", "s") if many else ("is", "")
        intro = (
            f"The following text hides secret {kind}s of some things. Remember them; "
            "you will be asked about them afterwards."
        )
        question = f"What {verb} the secret {kind}{plural} of {names} in the text?"
        if many:
            question += " Give all of them."
        prefix = f"The secret {kind}{plural} of {names} in the text {verb}:"
        return intro, question, prefix
