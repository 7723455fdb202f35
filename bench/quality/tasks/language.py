"""Text to be predicted token by token, and summaries."""

from __future__ import annotations

from collections.abc import Sequence

from bench.quality.tasks.corpus import detokenize, half
from bench.quality.tasks.filler import essay_passage, fitted
from bench.quality.tasks.sample import ASK, LIKELIHOOD, Draw, Sample, text_ids

TARGETS = 256
"""Decoded tokens of a text: several passes at the default interval."""
SUMMARY_TOKENS = 160
CHARS = 12
"""Characters of text fetched for each token: more than any tokenizer needs."""


def _predict(draw: Draw, text: str) -> Sample:
    ids = text_ids(draw.tokenizer, text)[: draw.length]
    if len(ids) < draw.length or draw.length < 2 * TARGETS:
        raise ValueError(
            f"{draw.task}: no text of {draw.length} tokens, or under {2 * TARGETS}"
        )
    return draw.sample(
        prompt="",
        answers=(),
        max_new_tokens=TARGETS,
        scorer="likelihood",
        mode=LIKELIHOOD,
        tokens=tuple(ids[:-TARGETS]),
        targets=tuple(ids[-TARGETS:]),
    )


def essays(draw: Draw) -> Sample:
    """The last 256 tokens of a passage of essays."""
    return _predict(draw, " ".join(essay_passage(draw)))


def wikitext(draw: Draw) -> Sample:
    """The last 256 tokens of a passage of WikiText-2."""
    text = draw.corpus.wikitext_half(draw.seed)
    start = draw.rng("wikitext").randrange(max(1, len(text) - CHARS * draw.length))
    start = text.index("\n", start)
    return _predict(draw, detokenize(text[start : start + CHARS * draw.length]))


def _words(title: str, texts: Sequence[str]) -> list[str]:
    return " ".join([f"\n\n# {title}\n\n", *texts]).split(" ")


def _document(draw: Draw, scorer: str, mode: str) -> Sample:
    """WikiText articles, the first one cut off at the length, to be summarised."""
    articles = [
        (a.title, [*a.lead, *a.body])
        for a in half(draw.corpus.wiki_articles, draw.seed)
    ]
    articles = [a for a in articles if len(a[1]) > 2]
    # Each article comes first once; then they begin further down.
    first, skipped = draw.index % len(articles), 2 * (draw.index // len(articles))
    chosen = [articles[(first + i) % len(articles)] for i in range(len(articles))]
    title, texts = chosen[0]
    chosen[0] = (title, texts[skipped % (len(texts) - 1) :])
    words = [word for one in chosen for word in _words(*one)]
    ask = "Summarize the text above in five sentences."

    def make(units: int) -> Sample:
        text = " ".join(words[:units]).strip()
        return draw.sample(
            prompt=f"Read the following text.\n\n{text}\n\n{ask}",
            answers=(),
            max_new_tokens=SUMMARY_TOKENS,
            scorer=scorer,
            question=ask,
            mode=mode,
            from_full=True,
        )

    return fitted(draw, make, len(words))


def summary_likelihood(draw: Draw) -> Sample:
    """How likely the full cache's summary still is."""
    return _document(draw, "likelihood", LIKELIHOOD)


def summary_rouge(draw: Draw) -> Sample:
    """ROUGE-L of the summary against the full cache's."""
    return _document(draw, "rouge_l", ASK)


def summary_lead(draw: Draw) -> Sample:
    """ROUGE-L of a summary against what the article's authors put above it.

    The article stands without its opening among others, first or last; each does so
    once before the first comes again.
    """
    articles = [a for a in half(draw.corpus.wiki_texts, draw.seed) if len(a.body) > 2]
    turn, first = divmod(draw.index, len(articles))
    chosen = [articles[(first + i) % len(articles)] for i in range(len(articles))]
    own = _words("Article", chosen[0].body)[: draw.length * 3 // 5]
    others = [word for a in chosen[1 + turn :] for word in _words("Article", a.body)]
    place = "last" if turn % 2 else "first"
    ask = f"Summarize the {place} article in one paragraph."

    def make(units: int) -> Sample:
        texts = [own, others[:units]] if place == "first" else [others[:units], own]
        text = "\n\n".join(" ".join(words).strip() for words in texts).strip()
        return draw.sample(
            prompt=f"Read the following articles.\n\n{text}\n\n{ask}",
            answers=(" ".join(chosen[0].lead),),
            max_new_tokens=SUMMARY_TOKENS,
            scorer="rouge_l",
            question=ask,
        )

    return fitted(draw, make, len(others))
