"""bench.quality's runner for kvpress on a tiny model.

The methods themselves need kvpress, which the test environment does not have: the
uncompressed baseline is tested, and a method made for the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.quality import kvpress_answers, kvpress_systems
from bench.quality.asking import Answer
from bench.quality.kvpress_answers import WHOLE, Label
from bench.quality.kvpress_systems import Memory, PressAsker
from bench.quality.scoring import result
from bench.quality.systems import FULL, Setting, parse_system
from bench.quality.tasks.sample import (
    CONVERSATION,
    DICTATED,
    LIKELIHOOD,
    TURNS,
    Sample,
    encode,
    encode_parts,
    encode_said,
)
from tests.unit.bench.quality_fixtures import WordTokenizer
from tests.unit.bench.test_quality_kvpress_decoding import (
    Drawing,
    Shrinking,
    tiny_model,
)

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


PRESSES = {"norm": Shrinking, "drawn": Drawing}


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[..., PressAsker]:
    """Makes askers of one model, which know nothing yet or what `shared` does."""
    model = tiny_model()
    monkeypatch.setattr(kvpress_systems, "load", lambda _: model)
    monkeypatch.setattr(kvpress_systems, "presses", lambda: PRESSES)
    monkeypatch.setattr(kvpress_answers, "presses", lambda: PRESSES)

    def make(
        press: str, settings: Any = None, shared: Memory | None = None
    ) -> PressAsker:
        memory = shared or Memory()
        monkeypatch.setattr(kvpress_systems, "memory", lambda _: memory)
        system = parse_system(f"kvpress:{press}")
        return PressAsker(system, "tiny", SafeTokenizer(), settings)

    return make


@pytest.fixture
def asker(ask: Callable[..., PressAsker]) -> PressAsker:
    return ask("full")


@pytest.fixture
def prefills(monkeypatch: pytest.MonkeyPatch) -> list[list[Label]]:
    """Labels of every prefill that is made."""
    made: list[list[Label]] = []
    prefill = kvpress_answers.prefill

    def note(model: Any, contexts: Any, presses: dict[Label, Any]) -> Any:
        made.append(list(presses))
        return prefill(model, contexts, presses)

    monkeypatch.setattr(kvpress_answers, "prefill", note)
    return made


def greedy(asker: PressAsker, ids: list[int]) -> list[int]:
    """Without a cache."""
    said: list[int] = []
    for _ in range(NEW):
        logits = asker.answering.model(torch.tensor([ids + said])).logits[0, -1]
        token = int(logits.argmax())
        if token in asker.answering.ends:
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
    asker.answering.ends.add(greedy(asker, prompts[1])[2])
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


def test_a_conversation_is_compressed_before_its_last_question(
    asker: PressAsker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole cache's answer is the model's own to the whole conversation."""
    read = []
    prefill = kvpress_answers.prefill

    def note(model: Any, contexts: Any, presses: Any) -> Any:
        read.extend(contexts)
        return prefill(model, contexts, presses)

    monkeypatch.setattr(kvpress_answers, "prefill", note)
    said = (("Read this .", "I have ."), ("What is it ?", "It is that ."))
    talk = sample(0, mode=CONVERSATION, said=said)
    (answer,) = asker.answer([talk], FULL)
    pieces = encode_said(asker.tokenizer, talk)
    ids = [token for piece in pieces for token in piece]
    assert read == [ids[: -len(pieces[-1])]]
    assert answer.text == asker.tokenizer.decode(greedy(asker, ids))
    assert answer.prompt_tokens == len(ids)


def test_likelihood_is_teacher_forcing(asker: PressAsker) -> None:
    texts = {(3, 4, 5, 6): (7, 8, 9), (5, 9, 2, 8, 1, 4): (6, 6), (9, 2, 1, 3): (4, 7)}
    samples = [
        sample(i, mode=LIKELIHOOD, scorer="likelihood", tokens=tokens, targets=targets)
        for i, (tokens, targets) in enumerate(texts.items())
    ]
    answers = asker.answer(samples, FULL)
    for one, answer in zip(samples, answers, strict=True):
        ids = torch.tensor([one.tokens + one.targets])
        truth = asker.answering.model(ids).logits[0].log_softmax(-1)
        expected = [
            truth[len(one.tokens) - 1 + i, token].item()
            for i, token in enumerate(one.targets)
        ]
        assert answer.thoughts is not None
        assert answer.thoughts.logprobs == pytest.approx(expected, abs=1e-4)
        reference = asker.answering.references[one.key]
        assert len(reference.ids) == len(reference.logprobs) == len(one.targets)
        record = result(one, answer)
        assert record["kl"] == pytest.approx(0, abs=1e-4)
        assert record["agree"] == 1


def test_summaries_come_from_the_full_cache(ask: Callable[..., PressAsker]) -> None:
    samples = [
        sample(0, answers=(), from_full=True, scorer="rouge_l"),
        sample(1, answers=(), from_full=True, scorer="likelihood", mode=LIKELIHOOD),
    ]
    shared = Memory()
    asker = ask("full", shared=shared)
    said, thought = asker.answer(samples, FULL)
    assert said.gold == (said.text,)
    (text,) = (answer.text for answer in asker.answer([sample(1)], FULL))
    assert thought.gold == (text,)
    assert thought.thoughts
    assert len(thought.thoughts.logprobs) == len(asker.tokenizer(text)["input_ids"])
    less, _ = ask("norm", shared=shared).answer(samples, RATES[0])
    assert less.gold == said.gold
    assert less.text != said.text


MIXED = [
    sample(0),
    sample(1, mode=DICTATED),
    sample(2),
    sample(3, mode=LIKELIHOOD, scorer="likelihood", tokens=(3, 4, 5), targets=(7, 8)),
]
KEYS = [one.key for one in MIXED]


NORM = [Label("norm", rate) for rate in RATES]


def coming(systems: dict[str, Sequence[Setting]]) -> Any:
    """Settings of systems that are all asked the same samples."""
    return {
        parse_system(f"kvpress:{name}"): dict.fromkeys(KEYS, settings)
        for name, settings in systems.items()
    }


def same(answers: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """Equal, but for the order of sums."""
    for one, other in zip(answers, expected, strict=True):
        assert replace(one, thoughts=None) == replace(other, thoughts=None)
        assert bool(one.thoughts) == bool(other.thoughts)
        for name in ("logprobs", "agree", "divergence") if one.thoughts else ():
            ours, theirs = (getattr(x.thoughts, name) for x in (one, other))
            assert ours == pytest.approx(theirs, abs=1e-4)


def test_a_prompt_is_read_once_for_all_rates(
    ask: Callable[..., PressAsker], prefills: list[list[Label]]
) -> None:
    one = ask("norm")
    alone = {rate: one.answer(MIXED, rate) for rate in RATES}
    assert alone[RATES[0]] != alone[RATES[1]]
    # The reference of the likelihood was made once, by the first.
    assert prefills == [[NORM[0]], [NORM[0]], [NORM[0], WHOLE], *[[NORM[1]]] * 3]
    prefills.clear()
    asker = ask("norm", coming({"norm": RATES}))
    assert not asker.remembers(KEYS, RATES[1])
    same(asker.answer(MIXED, RATES[0]), alone[RATES[0]])
    # Two of the prompts have the same length.
    assert prefills == [NORM, NORM, [*NORM, WHOLE]]
    assert asker.remembers(KEYS, RATES[1])
    assert not asker.remembers(KEYS, RATES[0])
    same(asker.answer(MIXED[::-1], RATES[1]), alone[RATES[1]][::-1])
    assert len(prefills) == 3
    # What was handed out is forgotten; other settings were done with.
    assert asker.answer(MIXED[:1], RATES[1]) == alone[RATES[1]][:1]
    assert prefills[3:] == [[NORM[1]]]


def test_systems_of_a_run_share_a_prefill(
    ask: Callable[..., PressAsker], prefills: list[list[Label]]
) -> None:
    wanted = {"full": [FULL], "norm": RATES, "drawn": RATES}
    pairs = [(name, rate) for name, rates in wanted.items() for rate in rates]
    alone = {(name, rate): ask(name).answer(MIXED, rate) for name, rate in pairs}
    prefills.clear()
    shared = Memory()
    # A method that does not exist is not asked.
    systems = coming({**wanted, "other": RATES})
    labels = [Label(*pair) for pair in pairs]
    for name in wanted:
        asker = ask(name, systems, shared)
        for rate in wanted[name]:
            assert asker.remembers(KEYS, rate) == (name != "full")
            same(asker.answer(MIXED, rate), alone[name, rate])
        assert prefills == [labels] * 3
        asker.close()
        # Nothing is answered for a system that was closed.
        systems.pop(parse_system(f"kvpress:{name}"))
    assert not shared.answers
    # Without a memory in common every system reads the prompts itself.
    ask("norm", coming({"norm": RATES})).answer(MIXED, RATES[0])
    assert prefills[3:] == [NORM, NORM, [*NORM, WHOLE]]


@pytest.mark.parametrize(("rows", "tokens", "held"), [(1, 10**6, 10**6), (9, 50, 50)])
def test_small_batches_give_the_same_answers(
    ask: Callable[..., PressAsker],
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    tokens: int,
    held: int,
) -> None:
    wanted = coming({"norm": RATES, "drawn": RATES})
    expected = ask("norm", wanted).answer(MIXED, RATES[0])
    made: list[int] = []
    joined, packed = kvpress_answers.joined, kvpress_answers.packed

    def pack(lengths: list[int]) -> list[list[int]]:
        batches = packed(lengths, rows, tokens)
        made.append(len(batches))
        return batches

    monkeypatch.setattr(kvpress_answers, "joined", lambda some: joined(some, held))
    monkeypatch.setattr(kvpress_answers, "packed", pack)
    answers = ask("norm", wanted).answer(MIXED, RATES[0])
    assert sum(made) > 4
    same(answers, expected)


class Failing(Shrinking):
    """A method with a fault."""

    def compress(self, *_: Any) -> Any:
        raise RuntimeError("no such luck")


def test_a_method_that_fails_fails_alone(
    ask: Callable[..., PressAsker],
    prefills: list[list[Label]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(PRESSES, "failing", Failing)
    shared, wanted = Memory(), coming({"norm": RATES, "failing": RATES})
    alone = ask("norm").answer(MIXED[:1], RATES[0])
    prefills.clear()
    with pytest.warns(UserWarning, match="no such luck"):
        assert ask("norm", wanted, shared).answer(MIXED[:1], RATES[0]) == alone
    failing = [Label("failing", rate) for rate in RATES]
    assert prefills == [[*NORM, *failing], NORM]
    with pytest.raises(RuntimeError, match="no such luck"):
        ask("failing", wanted, shared).answer(MIXED[:1], RATES[0])
    # From now on none is asked for another.
    ask("norm", wanted, shared).answer(MIXED[2:3], RATES[0])
    assert prefills[3:] == [NORM]


def test_how_much_a_method_may_keep(ask: Callable[..., PressAsker]) -> None:
    (answer,) = ask("norm").answer(MIXED[:1], RATES[0])
    tokens = answer.prompt_tokens
    assert answer.resident == round(tokens / 4)
    # A budget that is no less than the prompt evicts nothing.
    (whole,) = ask("norm").answer(MIXED[:1], Setting(budget=tokens))
    (full,) = ask("full").answer(MIXED[:1], FULL)
    assert (whole.text, whole.resident) == (full.text, tokens)
    with pytest.raises(ValueError, match="known: full, rkv, norm, drawn"):
        ask("other")


def observe(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    """Methods with a window, their own and (as AdaKV) that of another inside."""
    windowed = type("Windowed", (Shrinking,), {"window_size": window})
    inside = type("Inside", (Failing,), {"press": windowed(0.75)})
    monkeypatch.setitem(PRESSES, "windowed", windowed)
    monkeypatch.setitem(PRESSES, "inside", inside)


def test_a_prompt_within_the_window_stays_whole(
    ask: Callable[..., PressAsker], monkeypatch: pytest.MonkeyPatch
) -> None:
    (full,) = ask("full").answer(MIXED[:1], FULL)
    observe(monkeypatch, full.prompt_tokens)
    for method in ("windowed", "inside"):
        (answer,) = ask(method).answer(MIXED[:1], RATES[0])
        assert answer.text == full.text


def test_a_prompt_longer_than_the_window_does_not(
    ask: Callable[..., PressAsker], monkeypatch: pytest.MonkeyPatch
) -> None:
    (full,) = ask("full").answer(MIXED[:1], FULL)
    observe(monkeypatch, full.prompt_tokens - 1)
    (answer,) = ask("windowed").answer(MIXED[:1], RATES[0])
    assert answer.text != full.text
    with pytest.raises(RuntimeError, match="no such luck"):
        ask("inside").answer(MIXED[:1], RATES[0])


def test_what_a_method_keeps() -> None:
    assert Setting(rate=3).kept(100) == 33
