"""Classification after many labelled examples."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bench.quality.tasks.corpus import half
from bench.quality.tasks.filler import fitted
from bench.quality.tasks.sample import Draw, Sample
from bench.quality.tasks.words import ADJECTIVES

CLASSES = 6
MIN_CHARS, MAX_CHARS = 60, 300


def sentences(text: str) -> list[str]:
    """Sentences of a paragraph that are neither very short nor very long."""
    parts = re.split(r"(?<=[.!?]) +(?=[A-Z])", text)
    return [part for part in parts if MIN_CHARS <= len(part) <= MAX_CHARS]


@dataclass(frozen=True)
class Classification:
    """Sentences of encyclopedia articles, to be assigned to the article.

    Attributes
    ----------
    synthetic : bool
        Labels are arbitrary words, so only the examples say what they mean; otherwise
        the titles of the articles.
    """

    synthetic: bool = False

    def __call__(self, draw: Draw) -> Sample:
        """Build a question; its classes, examples and sentence depend on the sample."""
        articles = half(_articles(draw), draw.seed)
        rng = draw.rng("classes")
        chosen = rng.sample(articles, CLASSES)
        titles = [title for title, _ in chosen]
        labels = rng.sample(ADJECTIVES, CLASSES) if self.synthetic else titles
        tested = rng.randrange(CLASSES)
        pools = [list(texts) for _, texts in chosen]
        for pool in pools:
            rng.shuffle(pool)
        target = pools[tested].pop()
        # One example of each class after the other, so that all grow alike.
        most = max(len(pool) for pool in pools)
        shots = [
            (pool[i % len(pool)], label)
            for i in range(most)
            for pool, label in zip(pools, labels, strict=True)
        ]
        question = f"Text: {target}\nLabel:"
        intro = (
            "Each text has one of these labels: "
            f"{', '.join(sorted(labels))}. Give the label of the last text."
        )

        def make(units: int) -> Sample:
            shown = shots[:units]
            draw.rng("shuffle").shuffle(shown)
            text = "\n\n".join(f"Text: {text}\nLabel: {label}" for text, label in shown)
            return draw.sample(
                prompt=f"{intro}\n\n{text}\n\n{question}",
                answers=(labels[tested],),
                max_new_tokens=16,
                scorer="starts",
                question=question,
                prefix="Label:",
            )

        return fitted(draw, make, len(shots))


def _articles(draw: Draw) -> list[tuple[str, list[str]]]:
    """Title and sentences of every article that has enough of them."""
    found = [
        (a.title, [s for p in a.paragraphs for s in sentences(p.text)])
        for a in draw.corpus.articles
    ]
    found += [
        (a.title, [s for text in (*a.lead, *a.body) for s in sentences(text)])
        for a in draw.corpus.wiki_articles
    ]
    return [(title, texts) for title, texts in found if len(texts) >= 8]
