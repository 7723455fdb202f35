"""The data files that prompts are made of; see the folder's own README.

Odd and even seeds never share an essay passage, a question, a problem or a retrieval
case: what was tuned on one half can be reported on the other.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

ROOT = Path(__file__).parents[3]
DEFAULT_DATA = ROOT.parent / "shared" / "data"
ESSAYS = "essays.txt"
XQUAD = "xquad.en.json"
GSM8K = "gsm8k_test.jsonl"
MATH = "math500.jsonl"
WIKITEXT = "wikitext2_test.txt"
KV_RETRIEVAL = "kv_retrieval_75keys_100.jsonl.gz"
STORIES = "squality_dev.jsonl.gz"
MEETINGS = "qmsum_val.jsonl.gz"
FILES = (ESSAYS, XQUAD, GSM8K, MATH, WIKITEXT, KV_RETRIEVAL, STORIES, MEETINGS)

T = TypeVar("T")


@dataclass(frozen=True)
class Paragraph:
    """One paragraph with its questions: (question, answers) pairs."""

    text: str
    questions: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Article:
    """A titled text in paragraphs."""

    title: str
    paragraphs: tuple[Paragraph, ...]


class WikiArticle(NamedTuple):
    """An encyclopedia's article, as paragraphs: its opening, and all after it."""

    title: str
    lead: list[str]
    body: list[str]


@dataclass(frozen=True)
class Report:
    """A long text that people have written about: (question, answers) pairs."""

    number: int
    text: str
    questions: tuple[tuple[str, tuple[str, ...]], ...]


def half(items: Sequence[T], seed: int) -> list[T]:
    """Half of the items: those that seeds of this parity may use."""
    return list(items[seed % 2 :: 2])


def detokenize(text: str) -> str:
    """WikiText as it is usually written, its unknown words left out."""
    text = re.sub(r"\s*<unk>", "", text)
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r"\s+([,.;:!?)\]])", r"\1", text)
    text = re.sub(r"([(\[])\s+", r"\1", text)
    text = re.sub(r"\s+('s|'t|'re|'ve|'ll|'d|'m)\b", r"\1", text)
    return re.sub(r"[ \t]+", " ", text).strip()


class Corpus:
    """Reads each file once, when it is first needed.

    Parameters
    ----------
    folder : Path
        Holds the files named in `FILES`.
    """

    def __init__(self, folder: Path = DEFAULT_DATA) -> None:
        self.folder = folder

    def _path(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{name} is not in {self.folder}; give the folder of the evaluation "
                "data with --data"
            )
        return path

    def _lines(self, name: str) -> list[dict[str, Any]]:
        raw = self._path(name).read_bytes()
        text = (gzip.decompress(raw) if name.endswith(".gz") else raw).decode()
        return [json.loads(line) for line in text.splitlines() if line.strip()]

    @cached_property
    def essay_words(self) -> list[str]:
        """All essays in reading order, split at white space."""
        return self._path(ESSAYS).read_text(encoding="utf-8").split()

    def essay_half(self, seed: int) -> list[str]:
        """First or second half of the essays, by the seed's parity."""
        middle = len(self.essay_words) // 2
        return self.essay_words[middle:] if seed % 2 else self.essay_words[:middle]

    @cached_property
    def wikitext(self) -> str:
        """WikiText-2 test split, unchanged."""
        return self._path(WIKITEXT).read_text(encoding="utf-8")

    def wikitext_half(self, seed: int) -> str:
        """First or second half, cut at a line."""
        middle = self.wikitext.index("\n", len(self.wikitext) // 2)
        return self.wikitext[middle:] if seed % 2 else self.wikitext[:middle]

    @cached_property
    def wiki_texts(self) -> list[WikiArticle]:
        """All WikiText articles."""
        articles: list[WikiArticle] = []
        for line in self.wikitext.split("\n"):
            text = line.strip()
            if re.fullmatch(r"= [^=]+ =", text):
                articles.append(WikiArticle(text.strip("= "), [], []))
            elif articles and text.startswith("="):
                articles[-1].body.append("")
            elif articles and text:
                one = articles[-1]
                (one.body if one.body else one.lead).append(detokenize(text))
        return [a._replace(body=[text for text in a.body if text]) for a in articles]

    @cached_property
    def wiki_articles(self) -> list[WikiArticle]:
        """WikiText articles whose title is complete."""
        return [
            article._replace(title=detokenize(article.title))
            for article in self.wiki_texts
            if "<unk>" not in article.title and article.lead + article.body
        ]

    @cached_property
    def articles(self) -> list[Article]:
        """The XQuAD articles in their order."""
        data = json.loads(self._path(XQUAD).read_text(encoding="utf-8"))["data"]
        return [
            Article(
                entry["title"].replace("_", " "),
                tuple(_paragraph(p) for p in entry["paragraphs"]),
            )
            for entry in data
        ]

    @cached_property
    def gsm8k(self) -> list[dict[str, Any]]:
        """Grade-school problems: ``question`` and ``answer``."""
        return self._lines(GSM8K)

    @cached_property
    def math(self) -> list[dict[str, Any]]:
        """MATH-500 problems: ``problem`` and ``answer`` among others."""
        return self._lines(MATH)

    @cached_property
    def kv_cases(self) -> list[dict[str, Any]]:
        """Retrieval cases: ``ordered_kv_records``, ``key`` and ``value``."""
        return self._lines(KV_RETRIEVAL)

    @cached_property
    def stories(self) -> list[Report]:
        """SQuALITY: short stories, of each a plot and four questions."""
        return [_report(line, line["document"]) for line in self._lines(STORIES)]

    @cached_property
    def meetings(self) -> list[Report]:
        """QMSum: transcripts, one speaker a line."""
        lines = self._lines(MEETINGS)
        return [_report(line, "\n".join(line["transcript"])) for line in lines]


def half_by_number(items: Sequence[Report], seed: int) -> list[Report]:
    """Those whose number has the seed's parity."""
    return [item for item in items if item.number % 2 == seed % 2]


def _report(line: dict[str, Any], text: str) -> Report:
    # Marks of transcribers: {vocalsound}, {disfmarker}.
    text = re.sub(r" *\{\w+\}", "", text)
    questions = tuple((q["question"], tuple(q["answers"])) for q in line["questions"])
    return Report(int(line["id"]), text.strip(), questions)


def _paragraph(entry: dict[str, Any]) -> Paragraph:
    questions = tuple(
        (qa["question"], tuple(dict.fromkeys(a["text"].strip() for a in qa["answers"])))
        for qa in entry["qas"]
    )
    return Paragraph(entry["context"].strip(), questions)
