"""bench.quality.asking with an engine that answers from a table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.quality import forced
from bench.quality.asking import EngineAsker
from bench.quality.engines import engine_keywords
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

QUESTION = "Which one is it ?"


def sample(index: int = 0, **changes: Any) -> Sample:
    made = Sample(
        "task",
        "group",
        index,
        100,
        0,
        prompt=f"Some context number {index}. {QUESTION}",
        answers=("gold",),
        max_new_tokens=8,
        scorer="found",
        question=QUESTION,
        prefix="It is",
    )
    return replace(made, **changes)


class FakeEngine:
    """Says a text, or follows the dictation and then says it."""

    def __init__(self, tokenizer: WordTokenizer, say: Callable[[Any], str]) -> None:
        self.tokenizer, self.say = tokenizer, say
        self.calls: list[dict[str, Any]] = []
        self.flushed = 0
        self.down = False

    def generate(self, **keywords: Any) -> list[dict[str, Any]]:
        self.calls.append(keywords)
        pairs = zip(keywords["input_ids"], keywords["sampling_params"], strict=True)
        return [self._one(ids, p, keywords) for ids, p in pairs]

    def _one(self, ids: list[int], params: Any, keywords: Any) -> dict[str, Any]:
        custom = params.get("custom_params", {})
        text = self.say(custom.get("kv_compress"))
        out = self.tokenizer(text)["input_ids"]
        meta: dict[str, Any] = {"finish_reason": {"type": "stop"}}
        if "kv_compress" in custom:
            meta["kv_compress"] = {
                "resident_tokens": len(ids) // 2,
                "resumed_tokens": 3,
            }
        if job := custom.get(forced.KEY):
            out = ([*job["tokens"], *out, 0, 5])[: params["max_new_tokens"]]
            if "out" in job:
                Path(job["out"]).write_text(json.dumps(self._thoughts(job)))
        return {"text": text, "output_ids": out, "meta_info": meta}

    def _thoughts(self, job: dict[str, Any]) -> dict[str, Any]:
        count = len(job["tokens"])
        own = -0.5 if "ids" in job else -0.25
        reference = {"ids": [[4, 9]] * count, "logprobs": [[own, -9.0]] * count}
        return {
            "logprobs": [own] * count,
            "agree": [1.0] * count,
            "divergence": [0.125] * count,
            "reference": None if "ids" in job else reference,
        }

    def flush_cache(self) -> Any:
        self.flushed += 1
        return SimpleNamespace(success=True)

    def shutdown(self) -> None:
        self.down = True


def asker(
    say: Callable[[Any], str] = lambda _: "the gold one", system: str = "ours"
) -> EngineAsker:
    tokenizer = WordTokenizer()
    engine = FakeEngine(tokenizer, say)
    return EngineAsker(parse_system(system), "model", tokenizer, engine)


def test_a_conversation_is_a_request_a_turn() -> None:
    """Replies are dictated; each prompt is the one before, its reply and more."""
    ask = asker(system="ours:sessions=true")
    talks = [
        sample(i, mode=CONVERSATION, said=(("Read this.", "I have."),) * (1 + i))
        for i in range(2)
    ]
    answers = ask.answer(talks, Setting(rate=4))
    assert [answer.text for answer in answers] == ["the gold one"] * 2
    assert answers[0].resumed == 3
    assert result(talks[0], answers[0])["resumed"] == 3
    first, second, last = ask.engine.calls
    assert [len(call["input_ids"]) for call in (first, second, last)] == [2, 1, 2]
    one, two = (encode_said(ask.tokenizer, talk) for talk in talks)
    assert first["input_ids"] == [one[0], two[0]]
    assert second["input_ids"] == [two[0] + two[1] + two[2]]
    assert last["input_ids"] == [sum(one, []), sum(two, [])]
    for params, piece in zip(first["sampling_params"], (one, two), strict=True):
        assert params["custom_params"][forced.KEY]["tokens"] == piece[1]
        assert params["max_new_tokens"] == len(piece[1])
        assert params["custom_params"]["kv_compress"] == {"rate": 4}
    assert all(forced.KEY not in p["custom_params"] for p in last["sampling_params"])


def test_one_call_answers_all_samples() -> None:
    ask = asker()
    samples = [sample(0), sample(1, stop=("\n",))]
    answers = ask.answer(samples, Setting(rate=8))
    (call,) = ask.engine.calls
    assert call["input_ids"] == [encode(ask.tokenizer, s) for s in samples]
    first, second = call["sampling_params"]
    assert first["custom_params"] == {"kv_compress": {"rate": 8}}
    assert first["temperature"] == 0
    assert second["stop"] == ["\n"]
    assert [a.text for a in answers] == ["the gold one"] * 2
    assert answers[0].resident == answers[0].prompt_tokens // 2
    record = result(samples[1], answers[1])
    assert record["score"] == 1
    assert record["index"] == 1


def test_settings_become_options() -> None:
    ask = asker()
    for setting, option in (
        (FULL, {"enabled": False}),
        (Setting(budget=512), {"budget": 512}),
    ):
        ask.answer([sample()], setting)
        (params,) = ask.engine.calls[-1]["sampling_params"]
        assert params["custom_params"]["kv_compress"] == option
    stock = asker(system="stock")
    stock.answer([sample()], FULL)
    assert "custom_params" not in stock.engine.calls[-1]["sampling_params"][0]


def test_a_turn_is_two_requests() -> None:
    ask = asker()
    ask.answer([sample(mode=TURNS)], Setting(rate=2))
    first, second = ask.engine.calls
    assert first["sampling_params"][0]["max_new_tokens"] == 1
    text = ask.tokenizer.decode(second["input_ids"][0])
    assert text.endswith(f"[user]{QUESTION}<end>[assistant]It is")


def test_a_dictated_question_is_no_part_of_the_prompt() -> None:
    ask = asker()
    asked = sample(mode=DICTATED)
    (answer,) = ask.answer([asked], Setting(rate=4))
    context, question = encode_parts(ask.tokenizer, asked)
    (call,) = ask.engine.calls
    assert call["input_ids"] == [context]
    (params,) = call["sampling_params"]
    assert params["custom_params"][forced.KEY]["tokens"] == question
    assert params["ignore_eos"]
    # Cut at the end of the turn, which is also inside the dictated part.
    assert answer.text == "the gold one"


def test_likelihood_is_taken_against_the_full_cache() -> None:
    ask = asker()
    asked = sample(
        mode=LIKELIHOOD,
        tokens=(11, 12, 13),
        targets=(4, 5, 6),
        scorer="likelihood",
        prompt="",
        question="",
    )
    (answer,) = ask.answer([asked], Setting(rate=4))
    reference, measured = ask.engine.calls
    option = reference["sampling_params"][0]["custom_params"]["kv_compress"]
    assert option == {"enabled": False}
    job = measured["sampling_params"][0]["custom_params"][forced.KEY]
    assert job["ids"][0][0] == 4
    record = result(asked, answer)
    assert record["tokens"] == 2  # the first one came before the eviction
    assert record["nll"] == pytest.approx(0.5)
    assert record["kl"] == pytest.approx(0.125)
    assert record["agree"] == 1
    ask.answer([asked], Setting(rate=8))
    assert len(ask.engine.calls) == 3  # the reference is kept


@pytest.mark.parametrize("scorer", ["rouge_l", "likelihood"])
def test_summaries_are_compared_with_the_full_caches(scorer: str) -> None:
    ask = asker(lambda option: "a b c d" if option == {"enabled": False} else "a b")
    mode = LIKELIHOOD if scorer == "likelihood" else "ask"
    asked = sample(answers=(), from_full=True, mode=mode, scorer=scorer)
    setting = Setting(rate=4)
    (filled,) = ask.completed([asked])
    assert filled.answers == ("a b c d",)
    (answer,) = ask.answer([asked], setting)
    if scorer == "rouge_l":
        assert 0 < result(asked, answer)["score"] < 1
    else:
        assert ask.tokenizer.decode(list(filled.targets)) == "a b c d"
    asks = [c for c in ask.engine.calls if "custom_logit_processor" not in c]
    assert len(asks) == (2 if scorer == "rouge_l" else 1)


def test_mixed_batches_keep_their_order() -> None:
    ask = asker()
    modes = [TURNS, "ask", DICTATED, "ask"]
    samples = [sample(i, mode=mode) for i, mode in enumerate(modes)]
    answers = ask.answer(samples, Setting(rate=4))
    lengths = [len(encode_parts(ask.tokenizer, samples[2])[0])]
    assert answers[2].prompt_tokens == lengths[0]
    assert len(answers) == 4


def test_metrics_over_all_queries_get_no_cached_prefix() -> None:
    ask = asker(system="ours:metric=l2-full")
    ask.answer([sample()], FULL)
    assert ask.engine.flushed == 1
    plain = asker()
    plain.answer([sample()], FULL)
    assert plain.engine.flushed == 0
    plain.close()
    assert plain.engine.down


def test_a_refused_request_is_an_error() -> None:
    ask = asker()
    generate = ask.engine.generate

    def refuse(**keywords: Any) -> Any:
        outputs = generate(**keywords)
        outputs[0]["meta_info"]["finish_reason"] = {"type": "abort", "message": "no"}
        return outputs

    ask.engine.generate = refuse
    with pytest.raises(RuntimeError, match="refused"):
        ask.answer([sample()], FULL)


def test_options_of_sglang_are_its_keywords() -> None:
    system = parse_system("ours:tp_size=2,window=64")
    assert system.name == "ours:tp_size=2,window=64"
    keywords = system.keywords()
    assert (keywords["tp_size"], keywords["kv_compress_window"]) == (2, 64)


def test_engine_keywords() -> None:
    ours = parse_system("ours:allocation=head,window=64")
    gpu = engine_keywords(ours, "m", True, {"max_running_requests": 4})
    assert gpu["kv_compress"] is True
    assert gpu["kv_compress_allocation"] == "head"
    assert gpu["kv_compress_window"] == 64
    assert gpu["kv_compress_min_budget"] == 64
    assert gpu["max_running_requests"] == 4
    assert "device" not in gpu
    stock = engine_keywords(parse_system("stock"), "m", False, {})
    assert not any(key.startswith("kv_compress") for key in stock)
    assert stock["attention_backend"] == "torch_native"
    assert stock["device"] == "cpu"
