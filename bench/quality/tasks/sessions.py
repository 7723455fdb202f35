"""Conversations: a document in turn 1, and a question about it in turn 2 to 6.

What was asked and answered before is the same for all systems: the model's replies are
dictated. Each is longer than two pages, so that what a turn leaves reaches further than
its prompt, and the next one starts from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.quality.tasks.filler import essay_passage, fitted, scatter
from bench.quality.tasks.qa import ANSWER_TOKENS, chosen, mentions
from bench.quality.tasks.sample import CONVERSATION, Draw, Sample
from bench.quality.tasks.words import distinct

LAST_TURN = 6
ASKED_TURNS = range(2, LAST_TURN + 1)
"""By turns, over the samples of a task."""
VALUE_TOKENS = 12
READ = (
    "I have read all of it and will keep it in mind for the rest of our conversation. "
    "Please ask me whatever you want to know about the text, and I will answer from it."
)
MORE = (
    "I have looked it up in the text that you have given me at the beginning of our "
    "conversation. Ask me if there is anything else that you want to know about it."
)
NOTED = (
    "Thank you, I have taken note of it and will keep it in mind for the rest of our "
    "conversation. Go on with the next part whenever you like, and I will read it too."
)
Said = tuple[tuple[str, str], ...]


def turn_of(draw: Draw) -> int:
    """The turn in which a sample's question is asked."""
    return ASKED_TURNS[draw.index % len(ASKED_TURNS)]


def _ask(keys: Sequence[str]) -> tuple[str, str]:
    """A question for the numbers of keys, and how its answer begins."""
    names, many = ", ".join(keys), len(keys) > 1
    verb, plural = ("are", "s") if many else ("is", "")
    question = f"What {verb} the secret number{plural} of {names}?"
    if many:
        question += " Give all of them."
    return question, f"The secret number{plural} of {names} {verb}:"


def _told(key: str, value: str) -> tuple[str, str]:
    """A question that was answered in an earlier turn."""
    question, start = _ask([key])
    return question, f"{start} {value}. {MORE}"


def _fact(key: str, value: str) -> str:
    return f"The secret number of {key} is: {value}."


@dataclass(frozen=True)
class Document:
    """Needles in the document of turn 1; earlier turns ask for others of them.

    Attributes
    ----------
    asked : int
        Needles that the last turn asks for.
    """

    asked: int = 1

    def __call__(self, draw: Draw) -> Sample:
        """Build one conversation."""
        rng = draw.rng("needles")
        # As many needles whatever the turn, so that turns can be compared.
        keys = distinct("words", self.asked + LAST_TURN - 2, rng)
        values = distinct("numbers", len(keys), rng)
        pairs = list(zip(keys, values, strict=True))
        earlier = tuple(_told(*pair) for pair in pairs[self.asked :])[
            : turn_of(draw) - 2
        ]
        text = _scattered(draw, [_fact(*pair) for pair in pairs])
        question, prefix = _ask(keys[: self.asked])
        intro = (
            "The following text hides secret numbers of some things. Remember them; "
            "you will be asked about them afterwards."
        )

        def make(units: int) -> Sample:
            said = ((f"{intro}\n\n{text(units)}", READ), *earlier)
            return _sample(
                draw, said, question, tuple(values[: self.asked]), prefix=prefix
            )

        return fitted(draw, make, len(essay_passage(draw)))


def paragraph(draw: Draw) -> Sample:
    """A question about one of many paragraphs, behind questions about others."""
    article, place, question, answers = chosen(draw)
    gold = article.paragraphs[place]
    others = [p for a in draw.corpus.articles for p in a.paragraphs if p is not gold]
    others = [p for p in others if not mentions(p, answers)]
    draw.rng("others").shuffle(others)
    asked = [p for p in others if p.questions][: LAST_TURN - 2]
    others = [*asked, *(p for p in others if p not in asked)]
    depth = draw.rng("depth").random()
    task = "Answer with a few words from the documents. Question: "
    earlier = tuple(
        (task + words, f"Answer: {given[0]}. {MORE}")
        for words, given in (p.questions[0] for p in asked)
    )[: turn_of(draw) - 2]

    def make(units: int) -> Sample:
        shown = others[: len(asked) + units]
        draw.rng("order").shuffle(shown)
        shown.insert(int(depth * (len(shown) + 1)), gold)
        text = "\n\n".join(f"Document {i}: {p.text}" for i, p in enumerate(shown, 1))
        said = ((f"Read the documents.\n\n{text}", READ), *earlier)
        return _sample(draw, said, task + question, answers, "any", prefix="Answer:")

    return fitted(draw, make, len(others) - len(asked))


def facts(draw: Draw) -> Sample:
    """One fact in the text of every turn; the last turn asks for all of them."""
    rng = draw.rng("needles")
    keys = distinct("words", LAST_TURN - 1, rng)
    values = distinct("numbers", len(keys), rng)
    words, depths = essay_passage(draw), [rng.random() for _ in keys]
    question, prefix = _ask(keys)
    parts = list(enumerate(zip(keys, values, depths, strict=True)))

    def make(units: int) -> Sample:
        said = []
        for number, (key, value, depth) in parts:
            text = words[number * units : (number + 1) * units]
            text.insert(int(depth * (len(text) + 1)), _fact(key, value))
            intro = f"Part {number + 1} of a text. Remember the secret number in it."
            said.append((f"{intro}\n\n{' '.join(text)}", NOTED))
        return _sample(draw, tuple(said), question, tuple(values), prefix=prefix)

    return fitted(draw, make, len(words) // len(keys))


def instruction(draw: Draw) -> Sample:
    """A rule given before the document, which is used in the last turn only."""
    rng = draw.rng("needles")
    trigger, phrase, *keys = distinct("words", LAST_TURN, rng)
    values = distinct("numbers", len(keys), rng)
    pairs = list(zip(keys, values, strict=True))
    text = _scattered(draw, [_fact(*pair) for pair in pairs])
    rule = (
        f"This holds for our whole conversation: when I say {trigger!r}, answer with "
        f"the pass phrase {phrase!r} and nothing else."
    )

    def make(units: int) -> Sample:
        first = f"{rule}\n\nNow read this text.\n\n{text(units)}"
        said = ((first, READ), *(_told(*pair) for pair in pairs))
        return _sample(draw, said, f"I say {trigger!r}.", (phrase,))

    return fitted(draw, make, len(essay_passage(draw)))


def _scattered(draw: Draw, lines: list[str]) -> Callable[[int], str]:
    """Lines at random depths of so many words of an essay."""
    words, order = essay_passage(draw), draw.rng("order")
    order.shuffle(lines)
    depths = order.getstate()

    def text(units: int) -> str:
        order.setstate(depths)
        return scatter(words[:units], lines, order)

    return text


def _sample(
    draw: Draw,
    said: Said,
    question: str,
    answers: tuple[str, ...],
    scorer: str = "found",
    prefix: str = "",
) -> Sample:
    many = VALUE_TOKENS * len(answers) + 8
    return draw.sample(
        prompt=question,
        said=said,
        answers=answers,
        max_new_tokens=ANSWER_TOKENS if scorer == "any" else many,
        scorer=scorer,
        question=question,
        prefix=prefix,
        mode=CONVERSATION,
    )
