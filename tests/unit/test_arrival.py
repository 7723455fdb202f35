"""What the tokenizer process refuses is counted, by one of a few reasons."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_kvc.config.options import KVCompressOptions
from sglang_kvc.config.series import ARRIVAL_REASONS, REFUSED
from sglang_kvc.config.server_args import OPTIONS_ATTRIBUTE
from sglang_kvc.errors import ConfigError
from sglang_kvc.requests.arrival import check_arrival, check_tokens
from tests.doubles import counting_collector


def manager(*, metrics: bool = True) -> Any:
    """What of a TokenizerManager is asked."""
    options = KVCompressOptions()
    return SimpleNamespace(
        server_args=SimpleNamespace(device="cpu", **{OPTIONS_ATTRIBUTE: options}),
        model_config=SimpleNamespace(vocab_size=1000, hidden_size=4),
        context_len=4096,
        tokenizer=None,
        allow_auto_truncate=False,
        enable_metrics=metrics,
        metrics_collector=counting_collector() if metrics else None,
    )


def refused(asked: Any) -> dict[str, float]:
    """Count of every reason that is shown."""
    families = asked.metrics_collector.registry.collect()
    samples = [sample for family in families for sample in family.samples]
    return {
        sample.labels["reason"]: sample.value
        for sample in samples
        if sample.name == REFUSED.name
    }


def wrong_options(kv: dict[str, Any]) -> GenerateReqInput:
    """A request with these options."""
    params = {"custom_params": {"kv_compress": kv}}
    return GenerateReqInput(input_ids=[1], sampling_params=params)


def test_each_refusal_counts_once_by_its_reason() -> None:
    asked = manager()
    check_arrival(asked, GenerateReqInput(input_ids=[1]))
    assert refused(asked) == dict.fromkeys(ARRIVAL_REASONS, 0)
    for wrong in (
        wrong_options({"rate": 0.5}),
        GenerateReqInput(input_ids=[1], custom_labels={"kv_compress": "rate=x"}),
        GenerateReqInput(input_ids=[10**6]),
        GenerateReqInput(input_ids=[1], custom_labels={"team": "a"}),
        GenerateReqInput(text="x", image_data="y"),
    ):
        with pytest.raises(ConfigError):
            check_arrival(asked, wrong)
    with pytest.raises(ConfigError):
        check_tokens(asked, GenerateReqInput(text=""), [])
    assert refused(asked) == {"options": 2, "unserved": 1, "field": 3}


def test_nothing_is_counted_without_metrics() -> None:
    asked = manager(metrics=False)
    with pytest.raises(ConfigError):
        check_arrival(asked, wrong_options({"rate": 0.5}))
