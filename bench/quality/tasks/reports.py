"""Long answers about long texts: stories, meetings, articles, as users ask for them.

Several references stand for one answer: the best of them counts, as is usual for
ROUGE-L. Numbers of stories and meetings are odd for odd seeds and even for even ones.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt

from bench.quality.tasks.corpus import (
    Article,
    Report,
    WikiArticle,
    half,
    half_by_number,
)
from bench.quality.tasks.filler import essay_passage, fitted
from bench.quality.tasks.sample import LIKELIHOOD, Build, Draw, Sample

ANSWER_TOKENS = 512
REPLAYED_TOKENS = 300
MOST_WORDS = 10_500
"""Of a text: some 15,000 tokens."""
TOGETHER = 4
"""Articles in one report; one less every time that all have been first."""


@dataclass(frozen=True)
class Asked:
    """Questions on the texts of one file.

    Attributes
    ----------
    source : str
        Name of the texts in the corpus.
    what : str
        What a text is.
    """

    source: str
    what: str

    def __call__(self, draw: Draw) -> Sample:
        """Every text comes once before one comes again, with its next question."""
        own = half_by_number(self._texts(draw), draw.seed)
        turn, place = divmod(draw.index, len(own))
        text = own[place]
        question, answers = text.questions[turn % len(text.questions)]
        ask = f"{question} Answer in detail, from the {self.what} alone."
        return draw.sample(
            prompt=f"Read the following {self.what}.\n\n{text.text}\n\n{ask}",
            answers=answers,
            max_new_tokens=ANSWER_TOKENS,
            scorer="rouge_l",
            question=ask,
        )

    def _texts(self, draw: Draw) -> list[Report]:
        found: list[Report] = getattr(draw.corpus, self.source)
        return [one for one in found if len(one.text.split()) <= MOST_WORDS]


@dataclass(frozen=True)
class Replay:
    """How likely the full cache's own long answer to another task still is."""

    build: Build

    def __call__(self, draw: Draw) -> Sample:
        """The other task's prompt, and the beginning of what the full cache says."""
        return replace(
            self.build(draw),
            answers=(),
            scorer="likelihood",
            mode=LIKELIHOOD,
            max_new_tokens=REPLAYED_TOKENS,
            from_full=True,
        )


def _content(article: WikiArticle) -> Counter[str]:
    text = " ".join([*article.lead, *article.body]).lower()
    return Counter(re.findall(r"[a-z]{5,}", text))


def _likeness(a: Counter[str], b: Counter[str]) -> float:
    """Cosine of the square roots of two counts of words."""
    common = sum(sqrt(a[word] * b[word]) for word in a.keys() & b.keys())
    return common / sqrt(a.total() * b.total())


def wiki_report(draw: Draw) -> Sample:
    """Articles on related topics, without what their authors put above them."""
    articles = [a for a in half(draw.corpus.wiki_texts, draw.seed) if len(a.body) > 2]
    turn, place = divmod(draw.index, len(articles))
    first = articles[place]
    own = _content(first)
    others = sorted(
        (a for a in articles if a is not first),
        key=lambda a: _likeness(own, _content(a)),
        reverse=True,
    )
    chosen = [first, *others[: max(TOGETHER - 1 - turn, 1)]]
    bodies = [" ".join(article.body).split(" ") for article in chosen]
    ask = (
        "Write a report on the articles above: a paragraph on each, in their order, "
        "with its names, dates and numbers."
    )

    def make(units: int) -> Sample:
        parts = (
            f"# Article {number}\n\n{' '.join(body[:units])}"
            for number, body in enumerate(bodies, 1)
        )
        text = "\n\n".join(parts)
        return draw.sample(
            prompt=f"Read the following articles.\n\n{text}\n\n{ask}",
            answers=(" ".join(" ".join(article.lead) for article in chosen),),
            max_new_tokens=ANSWER_TOKENS,
            scorer="rouge_l",
            question=ask,
        )

    return fitted(draw, make, max(map(len, bodies)))


def essay_report(draw: Draw) -> Sample:
    """ROUGE-L of a report on a passage of essays against the full cache's."""
    words = essay_passage(draw)
    ask = (
        "Write a report on the text above: what is claimed, with which reasons and "
        "examples, from its beginning to its end."
    )

    def make(units: int) -> Sample:
        return draw.sample(
            prompt=f"Read the following text.\n\n{' '.join(words[:units])}\n\n{ask}",
            answers=(),
            max_new_tokens=ANSWER_TOKENS,
            scorer="rouge_l",
            question=ask,
            from_full=True,
        )

    return fitted(draw, make, len(words))


def fact_report(draw: Draw) -> Sample:
    """All facts of one article among others: those that people have asked about."""
    articles = half(draw.corpus.articles, draw.seed)
    article = articles[draw.index % len(articles)]
    facts = dict.fromkeys(
        answers[0] for p in article.paragraphs for _, answers in p.questions
    )
    others = [a for a in articles if a is not article]
    draw.rng("others").shuffle(others)
    depth = draw.rng("depth").random()
    words = [word for other in others for word in _section(other)]
    own = " ".join(_section(article))
    ask = (
        f"Write a full report on {article.title!r} from the text above, with every "
        "name, date, place and number."
    )

    def make(units: int) -> Sample:
        at = int(depth * units)
        text = " ".join([*words[:at], own, *words[at:units]]).strip()
        return draw.sample(
            prompt=f"Read the following text.\n\n{text}\n\n{ask}",
            answers=tuple(facts),
            max_new_tokens=ANSWER_TOKENS,
            scorer="found",
            question=ask,
        )

    return fitted(draw, make, len(words))


def listed_titles(draw: Draw) -> Sample:
    """The titles of all sections of a long document, in their order."""
    articles = half(draw.corpus.articles, draw.seed)
    draw.rng("order").shuffle(articles)
    sections = [(a.title, a.paragraphs[draw.index % 3].text) for a in articles]
    ask = (
        "List the titles of all sections of the document above, in their order, one on "
        "each line and nothing else."
    )

    def make(units: int) -> Sample:
        # Every section has a beginning; as much of each as the length allows.
        texts = [_titled(title, [text])[: 8 + units] for title, text in sections]
        text = "".join(" ".join(words) for words in texts).strip()
        return draw.sample(
            prompt=f"Read the following document.\n\n{text}\n\n{ask}",
            answers=tuple(title for title, _ in sections),
            max_new_tokens=ANSWER_TOKENS // 2,
            scorer="listed",
            question=ask,
        )

    return fitted(draw, make, max(len(text.split()) for _, text in sections))


def _section(article: Article) -> list[str]:
    return _titled(article.title, [paragraph.text for paragraph in article.paragraphs])


def _titled(title: str, texts: Sequence[str]) -> list[str]:
    return " ".join([f"\n\n# {title}\n\n", *texts]).split(" ")
