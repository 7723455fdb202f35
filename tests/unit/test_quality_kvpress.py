"""bench.quality's runner for kvpress: the uncompressed baseline on a tiny model.

The methods themselves need kvpress, which the test environment does not have.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.quality import kvpress_systems
from bench.quality.hf_decoding import equal_shapes
from bench.quality.kvpress_systems import PressAsker
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

VOCAB = 64
NEW = 6


def sample(index: int, **changes: Any) -> Sample:
    # No two are alike, but all have the same length.
    text = f"Some text {index} that is read. Question {index} ?"
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
    """No token of the model's is unknown to it."""

    def decode(self, ids: list[int], **more: Any) -> str:
        known = [i for i in ids if i < len(self.words)]
        return super().decode(known, **more) + "".join(
            f" {i}" for i in ids if i >= len(self.words)
        )


@pytest.fixture
def asker(monkeypatch: pytest.MonkeyPatch) -> PressAsker:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=VOCAB - 1,
        bos_token_id=None,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config).eval()
    monkeypatch.setattr(kvpress_systems, "load", lambda _: model)
    kvpress_systems._full_texts.clear()
    kvpress_systems._full_references.clear()
    return PressAsker(parse_system("kvpress:full"), "tiny", SafeTokenizer())


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
    samples = [sample(i) for i in range(3)] + [sample(7, mode=DICTATED)]
    answers = asker.answer(samples, FULL)
    for one, answer in zip(samples, answers, strict=True):
        said = greedy(asker, encode(asker.tokenizer, one))
        assert answer.text == asker.tokenizer.decode(said)
        assert answer.output_tokens == len(said)
    context, question = encode_parts(asker.tokenizer, samples[-1])
    assert answers[-1].prompt_tokens == len(context) + len(question)
    (turn,) = asker.answer([sample(0, mode=TURNS)], FULL)
    assert turn.prompt_tokens > answers[0].prompt_tokens


def test_likelihood_is_teacher_forcing(asker: PressAsker) -> None:
    one = sample(
        0, mode=LIKELIHOOD, scorer="likelihood", tokens=(3, 4, 5, 6), targets=(7, 8, 9)
    )
    (answer,) = asker.answer([one], FULL)
    logits = asker.model(torch.tensor([[3, 4, 5, 6, 7, 8, 9]])).logits[0]
    truth = logits.log_softmax(-1)
    expected = [truth[3 + i, token].item() for i, token in enumerate((7, 8, 9))]
    assert answer.thoughts is not None
    assert answer.thoughts.logprobs == pytest.approx(expected, abs=1e-4)
    record = result(one, answer)
    assert record["kl"] == pytest.approx(0, abs=1e-4)
    assert record["agree"] == 1


def test_summaries_come_from_the_full_cache(asker: PressAsker) -> None:
    one = sample(0, answers=(), from_full=True, scorer="rouge_l")
    (answer,) = asker.answer([one], FULL)
    assert answer.gold == (answer.text,)


def test_prompts_of_equal_length_are_asked_together() -> None:
    shapes = [(False, 10, 0), (True, 10, 0), (False, 10, 0), (False, 12, 0)]
    assert equal_shapes(shapes) == [[0, 2], [1], [3]]
    assert equal_shapes(shapes, most=10) == [[0], [2], [1], [3]]


def test_what_a_method_keeps() -> None:
    assert Setting(rate=3).kept(100) == 33
