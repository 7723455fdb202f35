"""A tokenizer of words and a small data folder, for the tests of bench.quality."""

from __future__ import annotations

import gzip
import json
import random
import re
import uuid
from pathlib import Path
from typing import Any

from bench.quality.tasks.corpus import (
    ESSAYS,
    GSM8K,
    KV_RETRIEVAL,
    MATH,
    MEETINGS,
    STORIES,
    WIKITEXT,
    XQUAD,
)

SYLLABLES = "ba co di fu ga he ji ko lu ma ne po ra si tu ve wo xa yi zu".split()  # noqa: SIM905


class WordTokenizer:
    """Tokens are words, marks and blanks; decoding gives the text back."""

    eos_token_id = 0

    def __init__(self) -> None:
        self.words = ["<end>"]
        self._ids = {"<end>": 0}

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        ids = []
        for word in re.findall(r"<end>|\w+|[^\w]", text):
            if word not in self._ids:
                self._ids[word] = len(self.words)
                self.words.append(word)
            ids.append(self._ids[word])
        return {"input_ids": ids}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(self.words[i] for i in ids)

    def apply_chat_template(self, messages: Any, **_: Any) -> str:
        turns = (f"[{m['role']}]{m['content']}<end>" for m in messages)
        return "".join(turns) + "[assistant]"


def make_data(folder: Path) -> Path:
    """Files as `Corpus` reads them, made of nonsense."""
    rng = random.Random(0)
    lexicon = ["".join(rng.choices(SYLLABLES, k=3)) for _ in range(900)]

    def prose(sentences: int) -> str:
        return " ".join(
            " ".join(rng.choices(lexicon, k=14)).capitalize() + "."
            for _ in range(sentences)
        )

    (folder / ESSAYS).write_text(prose(4000))
    lines = []
    for number in range(30):
        lines += [f" = Title {number} = ", f" {prose(8)} ", " = = Section = = "]
        lines += [f" {prose(8)} " for _ in range(3)]
    (folder / WIKITEXT).write_text("\n".join(lines))
    articles = []
    for number in range(20):
        paragraphs = []
        for place in range(3):
            fact = f"The code of hall {number} {place} is K{number}x{place}."
            question = f"What is the code of hall {number} {place}?"
            answers = [{"text": f"K{number}x{place}", "answer_start": 0}]
            paragraphs.append(
                {
                    "context": f"{prose(4)} {fact} {prose(3)}",
                    "qas": [{"question": question, "answers": answers}],
                }
            )
        articles.append({"title": f"Article_{number}", "paragraphs": paragraphs})
    (folder / XQUAD).write_text(json.dumps({"data": articles}))
    problems = [
        {
            "question": f"What is {i} plus 1000?",
            "answer": f"It is <<{i}+1000={i + 1000}>>.\n#### {i + 1000:,}",
        }
        for i in range(60)
    ]
    (folder / GSM8K).write_text("\n".join(map(json.dumps, problems)))
    math = [{"problem": f"Name {i}.", "answer": f"{i}"} for i in range(10)]
    (folder / MATH).write_text("\n".join(map(json.dumps, math)))
    cases = []
    for _ in range(6):
        pairs = [
            [str(uuid.UUID(int=rng.getrandbits(128))) for _ in range(2)]
            for _ in range(75)
        ]
        key, value = pairs[rng.randrange(75)]
        cases.append({"ordered_kv_records": pairs, "key": key, "value": value})
    for name, text, count in ((STORIES, "document", 4), (MEETINGS, "transcript", 1)):
        long = [
            {
                "id": str(number),
                text: prose(40) if count > 1 else [f"Ann: {prose(2)}"] * 20,
                "questions": [
                    {"question": f"What is {k}?", "answers": [prose(3)] * count}
                    for k in range(2)
                ],
            }
            for number in (1, 2, 4, 5, 7, 8)
        ]
        packed = gzip.compress("\n".join(map(json.dumps, long)).encode())
        (folder / name).write_bytes(packed)
    packed = gzip.compress("\n".join(map(json.dumps, cases)).encode())
    (folder / KV_RETRIEVAL).write_bytes(packed)
    return folder
