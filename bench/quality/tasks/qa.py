"""Questions on paragraphs among other paragraphs, and on sections of long documents."""

from __future__ import annotations

from bench.quality.tasks.corpus import Article, Paragraph, half
from bench.quality.tasks.filler import fitted
from bench.quality.tasks.sample import Draw, Sample

ANSWER_TOKENS = 32


def chosen(draw: Draw) -> tuple[Article, int, str, tuple[str, ...]]:
    """Article, number of its paragraph, question and answers of this sample."""
    items = [
        (article, place, question, answers)
        for article in draw.corpus.articles
        for place, paragraph in enumerate(article.paragraphs)
        for question, answers in paragraph.questions
    ]
    own = half(items, draw.seed)
    # A walk over all questions in an order of the seed: no question comes twice.
    order = list(range(len(own)))
    Draw(draw.task, 0, draw.seed, 0, None, draw.corpus).rng("order").shuffle(order)
    return own[order[draw.index % len(own)]]


def paragraphs(draw: Draw) -> Sample:
    """Numbered paragraphs, one of which has the answer (RULER's qa)."""
    article, place, question, answers = chosen(draw)
    gold = article.paragraphs[place]
    others = [p for a in draw.corpus.articles for p in a.paragraphs if p is not gold]
    others = [p for p in others if not mentions(p, answers)]
    draw.rng("others").shuffle(others)
    depth = draw.rng("depth").random()
    ask = f"Answer with a few words from the documents. Question: {question}"

    def make(units: int) -> Sample:
        shown = others[:units]
        shown.insert(int(depth * (len(shown) + 1)), gold)
        text = "\n\n".join(f"Document {i}: {p.text}" for i, p in enumerate(shown, 1))
        return _sample(draw, f"Read the documents.\n\n{text}\n\n{ask}", ask, answers)

    return fitted(draw, make, len(others), margin=0)


def documents(draw: Draw) -> Sample:
    """A long document whose titled sections are whole articles."""
    article, _, question, answers = chosen(draw)
    others = [a for a in draw.corpus.articles if a is not article]
    draw.rng("others").shuffle(others)
    depth = draw.rng("depth").random()
    # Sections are long, so the last one is cut at a paragraph.
    pieces = [(a.title, p.text) for a in others for p in a.paragraphs]
    own = [(article.title, p.text) for p in article.paragraphs]
    ask = (
        f"According to the section {article.title!r}, answer with a few words: "
        f"{question}"
    )

    def make(units: int) -> Sample:
        starts = [
            i
            for i in range(units + 1)
            if i in (0, units) or pieces[i - 1][0] != pieces[i][0]
        ]
        at = starts[int(depth * len(starts))]
        shown = [*pieces[:at], *own, *pieces[at:units]]
        text, title = "", ""
        for name, paragraph in shown:
            text += f"\n\n# {name}\n\n" if name != title else "\n"
            text += paragraph
            title = name
        return _sample(draw, f"Read this document.{text}\n\n{ask}", ask, answers)

    return fitted(draw, make, len(pieces))


def mentions(paragraph: Paragraph, answers: tuple[str, ...]) -> bool:
    """Whether a paragraph has one of the answers, too."""
    return any(answer in paragraph.text for answer in answers if len(answer) > 3)


def _sample(draw: Draw, prompt: str, ask: str, answers: tuple[str, ...]) -> Sample:
    return draw.sample(
        prompt=prompt,
        answers=answers,
        max_new_tokens=ANSWER_TOKENS,
        scorer="any",
        question=ask,
        prefix="Answer:",
    )
