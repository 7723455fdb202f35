"""bench.serving.passkey without an engine: prompts, arguments, keywords, verdicts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.serving.passkey import (
    FULL,
    check_chunked,
    engine_keywords,
    engine_plan,
    parse_arguments,
    sampling_params,
    show,
    summarize,
    yarn_overrides,
)
from bench.serving.passkey_prompts import (
    SENTENCES,
    Case,
    build_prompt,
    filler_tokens,
    make_cases,
)

QWEN = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 896,
    "num_attention_heads": 14,
    "max_position_embeddings": 32768,
}


class Letters:
    """A tokenizer whose tokens are characters; the chat frame takes two."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def apply_chat_template(self, messages: Any, **_: Any) -> list[int]:
        (message,) = messages
        return [ord(c) for c in f"<{message['content']}>"]


def arguments(*words: str) -> argparse.Namespace:
    return parse_arguments(["--model", "folder/model", *words])


def case(depth: float = 0.5, key: str = "12345", tokens: int = 60) -> Case:
    return Case(tokens, depth, key, list(range(tokens)))


def answer(text: str, chunk_passes: int = 3, **info: Any) -> dict[str, Any]:
    numbers = {"resident_tokens": 8, "peak_resident_tokens": 9, "passes": 4}
    kv = {**numbers, "chunk_passes": chunk_passes, **info}
    return {"text": text, "meta_info": {"kv_compress": kv, "cached_tokens": 0}}


def test_filler_repeats_its_text() -> None:
    ids = filler_tokens(Letters(), SENTENCES, 1000)
    assert len(ids) == 1000
    assert Letters().decode(ids) == (SENTENCES * 20)[:1000]
    assert Letters().decode(filler_tokens(Letters(), "a long text", 6)) == "a long"


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 1.0])
def test_prompt_has_its_length_and_its_key_at_the_depth(depth: float) -> None:
    filler = filler_tokens(Letters(), SENTENCES, 2000)
    ids = build_prompt(Letters(), filler, 2000, depth, "54321")
    text = Letters().decode(ids)
    assert len(ids) == 2000
    assert text.count("54321") == 2
    assert text.endswith("Answer with the number only.>")
    assert text.index("The pass key is") / 2000 == pytest.approx(depth, abs=0.15)


def test_prompt_too_short_for_its_question() -> None:
    with pytest.raises(ValueError, match="too few"):
        build_prompt(Letters(), [], 50, 0.5, "54321")


def test_cases_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    essay = tmp_path / "essay.txt"
    essay.write_text("Once upon a midnight dreary. ")
    words = ["--lengths", "400,500", "--keys", "2", "--filler-file", str(essay)]
    cases = make_cases(arguments(*words), Letters())
    assert cases == make_cases(arguments(*words), Letters())
    assert [c.length for c in cases] == [400] * 6 + [500] * 6
    assert all(len(c.ids) == c.length for c in cases)
    assert "midnight" in Letters().decode(cases[0].ids)
    assert len({c.key for c in cases}) > 6


def test_arguments_as_before() -> None:
    args = arguments("--lengths", "100", "200", "--samples", "3")
    assert args.lengths == [100, 200]
    assert args.keys == 3
    args = arguments()
    assert args.lengths == [4096, 8192]
    assert args.depths == [0.1, 0.5, 0.9]
    assert args.rates == [1, 2, 4, 8]
    assert (args.keys, args.pool, args.yarn, args.full) == (5, None, None, False)
    assert args.filler == "sentences"
    assert arguments("--text", "x").filler == "essay"


def test_lists_by_comma() -> None:
    args = arguments("--lengths", "60000", "--rates", "8,16", "--depths", "0.1,1")
    assert (args.lengths, args.rates, args.depths) == ([60000], [8, 16], [0.1, 1])


@pytest.mark.parametrize(
    "words", [("--filler", "essay"), ("--depths", "10,50"), ("--rates", "0.5")]
)
def test_wrong_arguments(words: tuple[str, str]) -> None:
    with pytest.raises(SystemExit):
        arguments(*words)


def test_engines_of_a_run() -> None:
    assert engine_plan(arguments("--rates", "8")) == [(None, [8])]
    assert engine_plan(arguments("--rates", "8", "--full")) == [(None, [8, FULL])]
    plan = engine_plan(arguments("--rates", "8,16", "--pool", "20480", "--full"))
    assert plan == [(20480, [8, 16]), (None, [FULL])]


def test_engine_keywords() -> None:
    keywords = engine_keywords(arguments(), None, gpu=True)
    assert keywords["kv_compress"] is True
    assert keywords["kv_compress_chunks"] == "auto"
    assert keywords["kv_compress_min_budget"] == 512
    assert not {"max_total_tokens", "json_model_override_args", "device"} & set(
        keywords
    )
    args = arguments("--chunks", "always", "--min-budget", "64")
    keywords = engine_keywords(args, 20480, gpu=True)
    assert keywords["max_total_tokens"] == 20480
    assert keywords["kv_compress_chunks"] == "always"
    assert keywords["kv_compress_min_budget"] == 64
    keywords = engine_keywords(args, None, gpu=False)
    assert keywords["device"] == "cpu"
    assert keywords["max_total_tokens"] > 0


def test_sampling_params() -> None:
    assert sampling_params(8)["custom_params"] == {"kv_compress": {"rate": 8}}
    full = sampling_params(FULL)["custom_params"]
    assert full == {"kv_compress": {"enabled": False}}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e6},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    ],
)
def test_yarn_reaches_the_model_through_sglang(
    tmp_path: Path, rope: dict[str, Any]
) -> None:
    """What SGLang's own functions make of the keyword, for old and new configs."""
    from sglang.srt.utils.hf_transformers import get_config
    from sglang.srt.utils.hf_transformers.common import (
        get_context_length,
        get_rope_config,
    )

    (tmp_path / "config.json").write_text(json.dumps({**QWEN, **rope}))
    args = parse_arguments(["--model", str(tmp_path), "--yarn", "4"])
    keywords = engine_keywords(args, None, gpu=True)
    overrides = json.loads(keywords["json_model_override_args"])
    config = get_config(
        str(tmp_path), trust_remote_code=False, model_override_args=overrides
    )
    base, parameters = get_rope_config(config)
    assert base == 1e6
    assert parameters["rope_type"] == "yarn"
    assert parameters["factor"] == 4
    assert parameters["original_max_position_embeddings"] == 32768
    assert get_context_length(config) == 131072


def test_yarn_refuses_a_scaled_model() -> None:
    rope = {"rope_theta": 1e4, "rope_type": "llama3"}
    config = SimpleNamespace(rope_parameters=rope, max_position_embeddings=8192)
    with pytest.raises(ValueError, match="llama3"):
        yarn_overrides(config, 2)


def test_cells_take_the_worst_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    batch = [case(0.1, "11111"), case(0.1, "22222"), case(0.9, "33333")]
    outputs = [
        answer("It is 11111.", 5, peak_resident_tokens=20),
        answer("no " * 50, 4, resident_tokens=10),
        answer("33333"),
    ]
    first, second = summarize(batch, outputs, 8, 40, 1.5)
    assert (first["found"], first["asked"], second["found"]) == (1, 2, 1)
    assert (first["resident"], first["peak_resident"]) == (10, 20)
    assert (first["passes"], first["chunk_passes"]) == (4, 4)
    assert first["prompt_tokens"] == [60, 60]
    assert first["wrong"] == [{"key": "22222", "answer": ("no " * 50)[:80]}]
    show([first, second])
    shown = capsys.readouterr().out
    assert "1/2" in shown
    assert f"22222 -> {('no ' * 50)[:80]!r}" in shown


def test_a_prompt_beyond_the_pool_needs_chunk_passes() -> None:
    good = summarize([case()], [answer("12345")], 8, 40, 1)
    lazy = summarize([case(), case()], [answer("12345"), answer("12345", 0)], 8, 40, 1)
    short = summarize([case(tokens=30)], [answer("12345", 0)], 8, 40, 1)
    full = summarize([case()], [answer("12345", 0)], FULL, 100, 1)
    check_chunked([*good, *short, *full])
    with pytest.raises(RuntimeError, match="no chunk passes"):
        check_chunked([*good, *lazy])
