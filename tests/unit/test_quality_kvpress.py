"""bench.quality's runner for kvpress on a tiny model.

The methods themselves need kvpress, which the test environment does not have: the
uncompressed baseline is tested, and a method made for the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.quality import kvpress_systems
from bench.quality.kvpress_systems import PressAsker
from bench.quality.records import read
from bench.quality.scoring import result
from bench.quality.systems import FULL, Setting, parse_system
from bench.quality.tasks.sample import (
    DICTATED,
    LIKELIHOOD,
    TURNS,
    Sample,
    encode,
    encode_parts,
)
from tests.unit.quality_fixtures import WordTokenizer
from tests.unit.test_quality_kvpress_decoding import Shrinking, tiny_model
from tests.unit.test_quality_run import Clock, FakeAsker, runner, wish

NEW = 6
RATES = (Setting(rate=4.0), Setting(rate=2.0))


def sample(index: int, **changes: Any) -> Sample:
    # No two are alike; those of an even index have the same length.
    more = "and on " * index * (index % 2)
    text = f"Some text {index} that is read {more}. Question {index} ?"
    made = {"mode": "ask", "scorer": "found", "answers": ("gold",), **changes}
    return Sample(
        "task",
        "group",
        index,
        50,
        0,
        prompt=text,
        max_new_tokens=NEW,
        question=f"Question {index} ?",
        **made,
    )


class SafeTokenizer(WordTokenizer):
    """Says any token of the model's, and the same whatever it has read by then."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(f"w{i}" for i in ids)


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[..., PressAsker]:
    """Makes askers of one model, which know nothing yet."""
    model = tiny_model()
    monkeypatch.setattr(kvpress_systems, "load", lambda _: model)
    monkeypatch.setattr(kvpress_systems, "presses", lambda: {"norm": Shrinking})
    monkeypatch.setattr(kvpress_systems, "_full_texts", {})
    monkeypatch.setattr(kvpress_systems, "_full_references", {})

    def make(press: str, settings: Any = None) -> PressAsker:
        system = parse_system(f"kvpress:{press}")
        return PressAsker(system, "tiny", SafeTokenizer(), settings)

    return make


@pytest.fixture
def asker(ask: Callable[..., PressAsker]) -> PressAsker:
    return ask("full")


@pytest.fixture
def prefills(monkeypatch: pytest.MonkeyPatch) -> list[list[Setting]]:
    """Settings of every prefill that is made."""
    made: list[list[Setting]] = []
    prefill = kvpress_systems.prefill

    def note(model: Any, contexts: Any, presses: dict[Setting, Any]) -> Any:
        made.append(list(presses))
        return prefill(model, contexts, presses)

    monkeypatch.setattr(kvpress_systems, "prefill", note)
    return made


def greedy(asker: PressAsker, ids: list[int]) -> list[int]:
    """Without a cache."""
    said: list[int] = []
    for _ in range(NEW):
        logits = asker.model(torch.tensor([ids + said])).logits[0, -1]
        token = int(logits.argmax())
        if token in asker.ends:
            break
        said.append(token)
    return said


def test_answers_are_the_models_own(asker: PressAsker) -> None:
    samples = [sample(i) for i in (0, 1, 2, 3, 5)]
    # Prompts whose questions are fed, some of them longer.
    samples += [sample(i, mode=DICTATED) for i in (4, 7, 9)]
    samples[-1] = replace(
        samples[-1],
        prompt="A text . Is this a question ?",
        question="Is this a question ?",
    )
    prompts = [encode(asker.tokenizer, one) for one in samples]
    # The second answer ends in its middle.
    asker.ends.add(greedy(asker, prompts[1])[2])
    answers = asker.answer(samples, FULL)
    for ids, answer in zip(prompts, answers, strict=True):
        said = greedy(asker, ids)
        assert answer.text == asker.tokenizer.decode(said)
        assert answer.output_tokens == len(said)
        assert answer.prompt_tokens == len(ids)
        assert answer.resident is None
    assert len({answer.output_tokens for answer in answers}) > 1
    parts = [encode_parts(asker.tokenizer, one) for one in samples[-2:]]
    assert len({len(question) for _, question in parts}) == 2
    (turn,) = asker.answer([sample(0, mode=TURNS)], FULL)
    assert turn.prompt_tokens > answers[0].prompt_tokens


def test_likelihood_is_teacher_forcing(asker: PressAsker) -> None:
    texts = {(3, 4, 5, 6): (7, 8, 9), (5, 9, 2, 8, 1, 4): (6, 6), (9, 2, 1, 3): (4, 7)}
    samples = [
        sample(i, mode=LIKELIHOOD, scorer="likelihood", tokens=tokens, targets=targets)
        for i, (tokens, targets) in enumerate(texts.items())
    ]
    answers = asker.answer(samples, FULL)
    for one, answer in zip(samples, answers, strict=True):
        ids = torch.tensor([one.tokens + one.targets])
        truth = asker.model(ids).logits[0].log_softmax(-1)
        expected = [
            truth[len(one.tokens) - 1 + i, token].item()
            for i, token in enumerate(one.targets)
        ]
        assert answer.thoughts is not None
        assert answer.thoughts.logprobs == pytest.approx(expected, abs=1e-4)
        reference = kvpress_systems._full_references[("tiny", *one.key)]
        assert len(reference.ids) == len(reference.logprobs) == len(one.targets)
        record = result(one, answer)
        assert record["kl"] == pytest.approx(0, abs=1e-4)
        assert record["agree"] == 1


def test_summaries_come_from_the_full_cache(ask: Callable[..., PressAsker]) -> None:
    samples = [
        sample(0, answers=(), from_full=True, scorer="rouge_l"),
        sample(1, answers=(), from_full=True, scorer="likelihood", mode=LIKELIHOOD),
    ]
    asker = ask("full")
    said, thought = asker.answer(samples, FULL)
    assert said.gold == (said.text,)
    (text,) = (answer.text for answer in asker.answer([sample(1)], FULL))
    assert thought.gold == (text,)
    assert thought.thoughts
    assert len(thought.thoughts.logprobs) == len(asker.tokenizer(text)["input_ids"])
    less, _ = ask("norm").answer(samples, RATES[0])
    assert less.gold == said.gold
    assert less.text != said.text


MIXED = [
    sample(0),
    sample(1, mode=DICTATED),
    sample(2),
    sample(3, mode=LIKELIHOOD, scorer="likelihood", tokens=(3, 4, 5), targets=(7, 8)),
]
KEYS = [one.key for one in MIXED]


def test_a_prompt_is_read_once_for_all_rates(
    ask: Callable[..., PressAsker], prefills: list[list[Setting]]
) -> None:
    alone = {rate: ask("norm").answer(MIXED, rate) for rate in RATES}
    assert alone[RATES[0]] != alone[RATES[1]]
    # The reference of the likelihood was made once, by the first.
    assert prefills == [[RATES[0]], [RATES[0]], [RATES[0], FULL], *[[RATES[1]]] * 3]
    prefills.clear()
    asker = ask("norm", dict.fromkeys(KEYS, RATES))
    assert not asker.remembers(KEYS, RATES[1])
    assert asker.answer(MIXED, RATES[0]) == alone[RATES[0]]
    # Two of the prompts have the same length.
    assert prefills == [list(RATES)] * 3
    assert asker.remembers(KEYS, RATES[1])
    assert not asker.remembers(KEYS, RATES[0])
    assert asker.answer(MIXED[::-1], RATES[1]) == alone[RATES[1]][::-1]
    assert len(prefills) == 3
    # What was handed out is forgotten; other settings were done with.
    assert asker.answer(MIXED[:1], RATES[1]) == alone[RATES[1]][:1]
    assert prefills[3:] == [[RATES[1]]]


def test_how_much_a_method_may_keep(ask: Callable[..., PressAsker]) -> None:
    (answer,) = ask("norm").answer(MIXED[:1], RATES[0])
    tokens = answer.prompt_tokens
    assert answer.resident == round(tokens / 4)
    # A budget that is no less than the prompt evicts nothing.
    (whole,) = ask("norm").answer(MIXED[:1], Setting(budget=tokens))
    (full,) = ask("full").answer(MIXED[:1], FULL)
    assert (whole.text, whole.resident) == (full.text, tokens)
    with pytest.raises(ValueError, match="known: full, norm"):
        ask("other")


class Remembering(FakeAsker):
    """Answers at all settings with the first question."""

    def __init__(self, clock: Clock, settings: Any) -> None:
        super().__init__(clock)
        self.settings, self.known = settings, set[Any]()

    def remembers(self, keys: Sequence[Any], setting: Setting) -> bool:
        return all((key, setting) in self.known for key in keys)

    def answer(self, samples: Sequence[Sample], setting: Setting) -> list[Any]:
        begin = self.clock.now
        known = self.remembers([one.key for one in samples], setting)
        answers = super().answer(samples, setting)
        if known:
            self.clock.now = begin
        for one in samples:
            self.known |= {(one.key, other) for other in self.settings[one.key]}
        return answers


def test_what_is_remembered_is_recorded_when_time_is_up(tmp_path: Path) -> None:
    out, clock = tmp_path / "q.jsonl", Clock()
    # Batches of three, ten seconds each: there is time for two.
    run = runner(wish(samples=9), out, clock, 25)
    run._start_cost = 0
    settings = run.settings(run.cells[0].system)
    assert [len(set(found)) for found in settings.values()] == [3] * 9
    asker = Remembering(clock, settings)
    assert run.run(lambda _: asker) == 9
    assert asker.asked == [(rate, 3) for rate in ("1", "8", "2") for _ in range(2)]
    assert clock.now == 20
    assert {len(cell.samples) for cell in read([out]).values()} == {6}


def test_what_is_remembered_says_nothing_about_what_is_not(tmp_path: Path) -> None:
    clock = Clock()
    # Ten seconds a length, whatever the length.
    wished = wish(samples=3, lengths=[4096, 8192, 16384])
    run = runner(wished, tmp_path / "q.jsonl", clock, 25)
    run._start_cost = 0
    asker = Remembering(clock, run.settings(run.cells[0].system))
    assert run.run(lambda _: asker) == 9
    assert clock.now == 20


def test_what_a_method_keeps() -> None:
    assert Setting(rate=3).kept(100) == 33
