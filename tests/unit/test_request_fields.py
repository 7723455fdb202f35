"""Bounds on the fields of a request, before SGLang looks at them."""

from __future__ import annotations

import dataclasses
import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.embed_types import PositionalEmbeds
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput

from sglang_kvc.config.options import KVCompressOptions
from sglang_kvc.config.server_args import OPTIONS_ATTRIBUTE
from sglang_kvc.errors import ConfigError, UnsupportedModeError
from sglang_kvc.requests.arrival import check_arrival
from sglang_kvc.requests.request_fields import (
    CHECKED,
    HARMLESS,
    UNSERVED,
    check_request,
    check_tokenized,
)
from sglang_kvc.requests.request_prompts import Limits

CPU = Limits(vocab=1000, context=4096, width=4, on_cpu=True)
GPU = dataclasses.replace(CPU, on_cpu=False)
TWO = {"input_ids": [[1], [2]]}


def check(limits: Limits = CPU, **fields: Any) -> None:
    """Check a request; `input_ids` unless it brings a prompt."""
    prompts = {"text", "input_ids", "input_embeds"}
    given = fields if prompts & set(fields) else {"input_ids": [1, 2], **fields}
    check_request(GenerateReqInput(**given), limits)


def test_every_field_of_sglang_is_decided() -> None:
    """A new one must be looked at before clients may set it."""
    fields = {field.name for field in dataclasses.fields(GenerateReqInput)}
    assert CHECKED | HARMLESS | set(UNSERVED) == fields
    assert len(CHECKED) + len(HARMLESS) + len(UNSERVED) == len(fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"text": "Hello"},
        {"text": ["Hello", "you"]},
        {"text": "Hello", "input_ids": [1]},
        {"input_ids": [0, 999]},
        {"input_ids": [[1], [2, 3]], "sampling_params": [{"n": 2}, {"n": 2}]},
        {"return_logprob": True, "top_logprobs_num": 5, "logprob_start_len": 0},
        {"return_logprob": True, "token_ids_logprob": [0, 999]},
        {**TWO, "token_ids_logprob": [[1], [2, 3]], "return_logprob": [True, False]},
        {**TWO, "token_ids_logprob": [1, 2, 3]},
        {"sampling_params": {"n": 2}, "return_logprob": [True]},
        {"image_data": [None], "bootstrap_host": [None], "images_config": {}},
        {"rid": "job-1", "priority": -3, "session_id": "x", "extra_key": "salt"},
        {**TWO, "rid": ["a-1", "a-2"], "extra_key": ["x", "y"]},
        {"rid": "0123456789abcdef"},
        {"rid": "HEALTH_CHECK_1", "log_metrics": False},
        {"lora_path": "adapter"},
        {"session_params": {"id": "s", "rid": None, "offset": -1, "replace": True}},
        {"sampling_params": None},
    ],
)
def test_served(fields: dict[str, Any]) -> None:
    check(**fields)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"input_ids": []}, "must be a list of token ids"),
    ({"input_ids": [[]]}, "no tokens"),
    ({"input_ids": [[5], []]}, "no tokens"),
    ({"input_ids": [1000]}, "got 1000 at position 0"),
    ({"input_ids": [3] * 50_000 + [-1]}, "got -1 at position 50000"),
    ({"input_ids": [[1], [2, 10**6]]}, "got 1000000 at position 1"),
    ({"input_ids": [2**63]}, "must be integers"),
    ({"input_ids": [1.5]}, "must be integers"),
    ({"input_ids": ["x" * 10**6]}, "must be integers"),
    ({"input_ids": [1, [2]]}, "must be integers"),
    ({"input_ids": [[1], 2]}, "must be integers"),
    ({"input_ids": {"a": 1}}, "must be a list of token ids"),
    ({"text": 5}, "text must be"),
    ({"text": ["a", None]}, "text must be"),
    ({"text": "x" * (4096 * 128 + 1)}, "more than can fit in the context"),
    ({"text": ["a", "\ud800"]}, "half a surrogate pair"),
    ({"text": "a", "input_ids": [[1]]}, "same number of prompts"),
    ({"text": ["a"], "input_ids": [[1], [2]]}, "same number of prompts"),
    ({"sampling_params": {"n": 1024}, "text": ["a"] * 65}, "66560 answers"),
    ({"text": ["a"] * 65_537}, "65537 answers"),
    ({"sampling_params": {"top_k": 2**40}}, "top_k"),
    ({"sampling_params": [{}]}, "sampling_params has 1 entries for one prompt"),
    ({**TWO, "sampling_params": [{}]}, "1 entries for 2 prompts"),
    ({**TWO, "sampling_params": [{}, 5]}, "sampling_params must be an object"),
    ({"sampling_params": 5}, "sampling_params must be an object"),
    ({"return_logprob": "yes"}, "return_logprob must be true or false"),
    ({"return_logprob": [True]}, "return_logprob has 1 entries"),
    ({"return_sampling_mask": 1}, "return_sampling_mask must be"),
    *[({"top_logprobs_num": value}, "top_logprobs_num") for value in (-1, 1001, [5])],
    *[({"logprob_start_len": value}, "logprob_start") for value in (-5, 4097, "a")],
    ({**TWO, "top_logprobs_num": [1, 2, 3]}, "3 entries for 2 prompts"),
    *[
        ({"token_ids_logprob": value}, "token_ids_logprob")
        for value in ([1000], [-1], ["a"], [[1]], "a", {"a": 1}, [1] * 1025)
    ],
    ({**TWO, "token_ids_logprob": [[1]]}, "1 entries for 2 prompts"),
    *[({"rid": value}, "rid") for value in ("", "a", "42", "x" * 257, 5, "\ud800")],
    ({**TWO, "rid": ["job-1", ""]}, "rid"),
    *[({"priority": value}, "priority") for value in (2**70, "high", 1.5)],
    *[({"received_time": value}, "received_time") for value in (math.nan, "a", -1)],
    *[({"session_id": value}, "session_id") for value in (5, "x" * 5000)],
    ({"extra_key": "x" * 5000}, "extra_key may have at most 4096"),
    ({"lora_path": ["x"]}, "lora_path has 1 entries"),
    ({"lora_path": 5}, "lora_path must be a string"),
    ({"custom_logit_processor": 5}, "custom_logit_processor must be a string"),
    *[
        ({"session_params": value}, "session_params")
        for value in (5, {"id": ["x"]}, {"foo": 1}, {"offset": 10**30}, {"replace": 1})
    ],
    *[
        ({"positional_embed_overrides": value}, "only Engine.generate can send")
        for value in (7, {"embeds": [[1.0]], "positions": [0]})
    ],
    ({**TWO, "positional_embed_overrides": [None]}, "1 entries for 2 prompts"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=lambda value: None)
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        check(**fields)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("name", UNSERVED)
@pytest.mark.parametrize("value", [1, "x" * 10**6, [None, "x"]], ids=str.__class__)
def test_unserved_fields_are_named(name: str, value: Any) -> None:
    with pytest.raises(UnsupportedModeError, match=name) as error:
        check(**{name: value})
    assert len(str(error.value)) < 500


def test_a_long_text_is_counted_no_further_than_needed() -> None:
    seen: list[str] = []

    def count(text: str) -> int:
        seen.append(text)
        return len(text) // 4

    limits = dataclasses.replace(CPU, context=50_000, count=count)
    check(limits, text="abcd" * 50_000)
    assert not seen
    with pytest.raises(ConfigError, match="400001 characters has more than"):
        check(limits, text="abcd" * 100_000 + "e")
    assert sum(map(len, seen)) < 300_000
    sparse = dataclasses.replace(limits, count=lambda text: len(text) // 100)
    check(sparse, text=" " * 4_000_000)


# Embeddings ---------------------------------------------------------------------------


def test_embeddings_are_refused_on_a_cpu() -> None:
    with pytest.raises(UnsupportedModeError, match="input_embeds on a CPU"):
        check(input_embeds=[[0.5] * 4])


@pytest.mark.parametrize(
    "embeds", [[[0.5] * 4], [[0.5] * 4] * 3, [[[0.5] * 4], [[0.5] * 4] * 2]]
)
def test_embeddings_are_served_on_a_gpu(embeds: Any) -> None:
    check(GPU, input_embeds=embeds)


@pytest.mark.parametrize(
    "embeds",
    [
        *([], [[]], [[[]]], [0.5], 7, "x", {"a": 1}),
        [[0.5] * 3],
        [[0.5] * 4, [0.5]],
        [[0.5] * 4, ["x"] * 4],
        [[math.nan] * 4],
        [[math.inf] * 4],
        [[1e30] * 4],
        [[0.5, 0.5, 0.5, 10**400]],
        [[[0.5] * 4], [[0.5] * 3]],
    ],
)
def test_embeddings_that_do_not_fit(embeds: Any) -> None:
    with pytest.raises(ConfigError, match="input_embeds"):
        check(GPU, input_embeds=embeds)


def test_overrides() -> None:
    def ask(embeds: list[list[float]], positions: Any) -> None:
        value = PositionalEmbeds(embeds=torch.tensor(embeds), positions=positions)
        check(positional_embed_overrides=value)

    ask([[0.5] * 4], [1])
    for embeds, positions in (
        ([[0.5] * 3], [0]),
        ([[math.nan] * 4], [0]),
        ([[0.5] * 4], [-1]),
        ([[0.5] * 4], ["a"]),
    ):
        with pytest.raises(ConfigError, match="positional_embed_overrides"):
            ask(embeds, positions)


# After tokenization -------------------------------------------------------------------


def tokenized(ids: Any, **fields: Any) -> None:
    """Check a request whose prompt has these tokens."""
    request = GenerateReqInput(text="x", **fields)
    request.normalize_batch_and_arguments()
    check_tokenized(request, ids)


def test_a_prompt_has_tokens() -> None:
    tokenized([1])
    with pytest.raises(ConfigError, match="no tokens"):
        tokenized([])


def test_log_probabilities_of_a_prompt_are_bounded() -> None:
    ids = [1] * 10_000
    asked = {"return_logprob": True, "top_logprobs_num": 1000}
    tokenized(ids, **asked)
    tokenized(ids, **asked, logprob_start_len=9000)
    tokenized(ids, top_logprobs_num=1000, logprob_start_len=0)
    with pytest.raises(ConfigError, match="10000000, at most 4194304"):
        tokenized(ids, **asked, logprob_start_len=0)


# In SGLang's tokenizer process --------------------------------------------------------


def manager(options: KVCompressOptions | None) -> Any:
    """What of a TokenizerManager is asked."""
    server_args = SimpleNamespace(device="cpu", **{OPTIONS_ATTRIBUTE: options})
    model = SimpleNamespace(vocab_size=1000, hidden_size=4)
    return SimpleNamespace(
        server_args=server_args,
        model_config=model,
        context_len=4096,
        tokenizer=SimpleNamespace(encode=lambda text, add_special_tokens: text),
        allow_auto_truncate=False,
    )


def test_only_servers_with_kv_compress_check() -> None:
    wrong = GenerateReqInput(input_ids=[10**6])
    check_arrival(manager(None), wrong)
    with pytest.raises(ConfigError) as error:
        check_arrival(manager(KVCompressOptions()), wrong)
    assert str(error.value).endswith(" See docs/guide.md#requests")


def test_options_are_checked_before_a_batch_is_expanded() -> None:
    params = {"custom_params": {"kv_compress": {"rate": 0}}}
    request = GenerateReqInput(text="x", sampling_params={"n": 1000, **params})
    with pytest.raises(ConfigError, match=r"kv_compress\.rate") as error:
        check_arrival(manager(KVCompressOptions()), request)
    assert str(error.value).endswith(" See docs/guide.md#one-request")


def test_the_tokenizer_counts() -> None:
    with pytest.raises(ConfigError, match="has more than 65520 tokens"):
        check_arrival(manager(KVCompressOptions()), GenerateReqInput(text="a" * 70_000))


def test_embedding_requests_are_left_to_sglang() -> None:
    check_arrival(manager(KVCompressOptions()), EmbeddingReqInput(text="x"))


def test_a_long_prompt_is_checked_in_no_time() -> None:
    start = time.perf_counter()
    check(input_ids=[7] * 1_000_000)
    assert time.perf_counter() - start < 0.5
