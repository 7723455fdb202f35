"""Write the page: one HTML file that needs no network."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from sglang_kvc.tools.view.client import Answer
from sglang_kvc.tools.view.drawings import LEVELS, chart, heat_map


@dataclass(frozen=True)
class View:
    """What the page shows.

    Attributes
    ----------
    model : what the server serves.
    prompt : name of the prompt's file.
    tokens : text of each token of the prompt.
    answers : the full cache's first; at least one was not refused.
    """

    model: str
    prompt: str
    tokens: list[str]
    answers: list[Answer]

    @property
    def full(self) -> Answer:
        """Answer with the whole cache, or a refusal."""
        return self.answers[0]


def render(view: View) -> str:
    """HTML of the page; every text in it is escaped."""
    rated = [answer for answer in view.answers[1:] if not answer.refused]
    script = _part("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = {
        "tokens": view.tokens,
        "levels": LEVELS,
        "series": [{"name": it.name, "shares": it.shares} for it in rated],
    }
    return Template(_part("page.html")).substitute(
        script=script,
        script_hash=f"sha256-{digest}",
        style=_part("page.css"),
        data=script_safe(data),
        model=escape(view.model),
        prompt=escape(view.prompt),
        num_tokens=f"{len(view.tokens):,}",
        choices="".join(
            _choice(place, it, it is rated[-1]) for place, it in enumerate(rated)
        ),
        legend=_legend(),
        heat_maps="".join(
            f'<div data-series="{place}">{heat_map(it)}</div>'
            for place, it in enumerate(rated)
        ),
        chart=chart(view.answers),
        numbers="".join(_numbers(it, view.full) for it in view.answers),
        answers="".join(_answer(it, view.full) for it in view.answers),
    )


def script_safe(data: Any) -> str:
    """JSON that may stand in a script element, whatever its texts are."""
    text = json.dumps(data, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def first_difference(text: str, other: str) -> int | None:
    """Place of the first character that differs; None if there is none."""
    if text == other:
        return None
    pairs = zip(text, other, strict=False)
    shorter = min(len(text), len(other))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)


def agreement(answer: Answer, full: Answer) -> str:
    """How far an answer is the full cache's, in words."""
    if full.refused or answer.refused:
        return "–"
    if answer is full:
        return "itself"
    if answer.token_ids == full.token_ids:
        return "the same answer"
    pairs = zip(answer.token_ids, full.token_ids, strict=False)
    shorter = min(len(answer.token_ids), len(full.token_ids))
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
    return f"differs from token {place + 1:,}"


def _choice(place: int, answer: Answer, chosen: bool) -> str:
    checked = " checked" if chosen else ""
    return (
        f'<label><input type="radio" name="series" value="{place}"{checked}> '
        f"{escape(answer.name)}</label>"
    )


def _legend() -> str:
    names = ["nobody", *(f"to {100 * end:.0f} %" for end in LEVELS[1:-1]), "to all"]
    return "".join(f'<li class="l{i}">{name}</li>' for i, name in enumerate(names))


def _numbers(answer: Answer, full: Answer) -> str:
    if answer.refused:
        return (
            f'<tr><th scope="row">{escape(answer.name)}</th>'
            f'<td colspan="6">refused: {escape(answer.refused)}</td></tr>'
        )
    told = answer.summary
    keys = ("logical_tokens", "resident_tokens", "peak_resident_tokens")
    counts = [f"{told[key]:,}" for key in keys]
    budget = told["budget_tokens"]
    counts += ["all" if budget is None else f"{budget:,}", str(told["passes"])]
    cells = "".join(f"<td>{cell}</td>" for cell in (*counts, agreement(answer, full)))
    return f'<tr><th scope="row">{escape(answer.name)}</th>{cells}</tr>'


def _answer(answer: Answer, full: Answer) -> str:
    head = f"<h3>{escape(answer.name)}</h3>"
    if answer.refused:
        return f"<article>{head}<p>Refused: {escape(answer.refused)}</p></article>"
    text, note = answer.text, agreement(answer, full)
    place = None if full.refused else first_difference(text, full.text)
    if place is None:
        shown = escape(text)
    else:
        # An answer that is the beginning of the other one differs in its end.
        mark = text[place : place + 1] or "⏹"
        shown = (
            f"{escape(text[:place])}<mark>{escape(mark)}</mark>"
            f'<span class="after">{escape(text[place + 1 :])}</span>'
        )
    return f'<article>{head}<p class="note">{note}</p><pre>{shown}</pre></article>'


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
