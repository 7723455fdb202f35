"""The tasks by name and group; `make_samples` builds their questions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from bench.quality.tasks import (
    code,
    fewshot,
    language,
    lookup,
    qa,
    reasoning,
    reports,
    sessions,
    tracking,
)
from bench.quality.tasks.corpus import Corpus
from bench.quality.tasks.needles import NEEDLES, NOISE, Needles
from bench.quality.tasks.reuse import Reuse
from bench.quality.tasks.sample import DICTATED, TURNS, Build, Draw, Sample

OWN_LENGTH = 0
"""Stands for the length of a task whose prompts are as long as they are."""


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes
    ----------
    name, group : str
    build : callable
        Makes one sample.
    ruler : bool
        Counts towards the mean of the 13 RULER-like tasks.
    fits : bool
        Whether its prompts are filled up to a length.
    """

    name: str
    group: str
    build: Build
    ruler: bool = False
    fits: bool = True


_SINGLE = Needles()
_STORY = reports.Asked("stories", "story")
_MEETING = reports.Asked("meetings", "meeting")
_ALL = (
    Task("needle_noise", "needles", Needles(hay=NOISE), True),
    Task("needle_numbers", "needles", _SINGLE, True),
    Task("needle_uuids", "needles", Needles(values="uuids"), True),
    Task("multikey_few", "multi-needles", Needles(others=3), True),
    Task("multikey_lines", "multi-needles", Needles(hay=NEEDLES), True),
    Task(
        "multikey_uuids",
        "multi-needles",
        Needles(hay=NEEDLES, keys="uuids", values="uuids"),
        True,
    ),
    Task("multivalue", "multi-needles", Needles(per_key=4), True),
    Task("multiquery", "multi-needles", Needles(asked=4), True),
    Task("needle_words", "needles", Needles(keys="numbers", values="words")),
    Task("variables", "tracking", tracking.variables, True),
    Task("common_words", "tracking", tracking.common_words, True),
    Task("frequent_words", "tracking", tracking.frequent_words, True),
    Task("qa_paragraphs", "qa", qa.paragraphs, True),
    Task("qa_documents", "qa", qa.documents, True),
    Task("kv_retrieval", "kv", lookup.retrieval),
    Task("gsm8k", "reasoning", reasoning.gsm8k, fits=False),
    Task("gsm8k_steps", "reasoning", reasoning.gsm8k_steps, fits=False),
    Task("math500", "reasoning", reasoning.math500, fits=False),
    Task("gsm8k_four", "chain", reasoning.gsm8k_four, fits=False),
    Task("math_long", "chain", reasoning.math_long, fits=False),
    Task("squality", "long", _STORY, fits=False),
    Task("qmsum", "long", _MEETING, fits=False),
    Task("code_purpose", "long", code.code_purpose, fits=False),
    Task("wiki_report", "long", reports.wiki_report),
    Task("fact_report", "long", reports.fact_report),
    Task("essay_report", "long", reports.essay_report),
    Task("squality_replay", "long-replay", reports.Replay(_STORY), fits=False),
    Task("qmsum_replay", "long-replay", reports.Replay(_MEETING), fits=False),
    Task("wiki_replay", "long-replay", reports.Replay(reports.wiki_report)),
    Task("code_names", "lists", code.code_names, fits=False),
    Task("listed_titles", "lists", reports.listed_titles),
    Task("topics", "fewshot", fewshot.Classification()),
    Task("labels", "fewshot", fewshot.Classification(synthetic=True)),
    Task("summary_lead", "summary", language.summary_lead),
    Task("summary_likelihood", "replay", language.summary_likelihood),
    Task("summary_rouge", "replay", language.summary_rouge),
    Task("essays", "lm", language.essays),
    Task("wikitext", "lm", language.wikitext),
    Task("later_needle", "reuse", Reuse(_SINGLE, DICTATED)),
    Task("later_multikey", "reuse", Reuse(Needles(others=3), DICTATED)),
    Task("later_qa", "reuse", Reuse(qa.paragraphs, DICTATED)),
    Task("turn_needle", "reuse", Reuse(_SINGLE, TURNS)),
    Task("turn_qa", "reuse", Reuse(qa.paragraphs, TURNS)),
    Task("session_needle", "sessions", sessions.Document()),
    Task("session_several", "sessions", sessions.Document(asked=4)),
    Task("session_qa", "sessions", sessions.paragraph),
    Task("session_facts", "sessions", sessions.facts),
    Task("session_instruction", "sessions", sessions.instruction),
)
TASKS = {task.name: task for task in _ALL}
GROUPS = tuple(dict.fromkeys(task.group for task in _ALL))
RULER = "ruler"
"""Names the 13 RULER-like tasks together."""
ALL = "all"


def resolve(names: Iterable[str]) -> list[Task]:
    """Tasks of names, groups, ``ruler`` and ``all``, each once, in the order given."""
    found: dict[str, Task] = {}
    for name in names:
        if name in TASKS:
            found[name] = TASKS[name]
            continue
        members = [
            task
            for task in _ALL
            if name in (ALL, task.group) or (name == RULER and task.ruler)
        ]
        if not members:
            raise ValueError(
                f"unknown task {name!r}; groups: {', '.join((ALL, RULER, *GROUPS))}; "
                f"tasks: {', '.join(TASKS)}"
            )
        found |= {task.name: task for task in members}
    return list(found.values())


def make_sample(
    task: Task, length: int, seed: int, index: int, tokenizer: Any, corpus: Corpus
) -> Sample:
    """One question, the same whenever it is asked for."""
    length = length if task.fits else OWN_LENGTH
    draw = Draw(task.name, length, seed, index, tokenizer, corpus)
    return replace(task.build(draw), group=task.group)
