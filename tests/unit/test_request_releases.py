"""Fields of a request that some releases of SGLang have, and what they resolve late."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_kvc.config.options import KVCompressOptions
from sglang_kvc.errors import ConfigError, UnsupportedModeError
from sglang_kvc.requests import arrival
from sglang_kvc.requests.arrival import check_arrival
from sglang_kvc.requests.request_fields import CHECKED
from sglang_kvc.requests.sampling_fields import SERVED
from tests.unit.test_request_fields import CPU, TWO, check, manager


@pytest.mark.skipif("cache_salt" not in CHECKED, reason="a later release has it")
def test_salts_are_bounded_names() -> None:
    check(cache_salt="tenant")
    check(CPU, **TWO, cache_salt=["a", "b"])
    for value in (5, "x" * 5000, "\ud800"):
        with pytest.raises(ConfigError, match="cache_salt"):
            check(cache_salt=value)
    with pytest.raises(ConfigError, match="1 entries for 2 prompts"):
        check(CPU, **TWO, cache_salt=["a"])


@pytest.mark.skipif(
    "sampling_logprobs_mode" not in CHECKED, reason="a later release has it"
)
def test_modes_of_log_probabilities_are_two_words() -> None:
    check(sampling_logprobs_mode="support")
    check(CPU, **TWO, sampling_logprobs_mode=["selected", None])
    for value in ("all", 7):
        with pytest.raises(ConfigError, match="one of selected, support"):
            check(sampling_logprobs_mode=value)


@pytest.mark.skipif("beam_width" not in SERVED, reason="a later release has it")
def test_beams_are_refused_before_a_batch_is_expanded() -> None:
    request = GenerateReqInput(text="x", sampling_params={"beam_width": 4})
    with pytest.raises(UnsupportedModeError, match="beam search"):
        check_arrival(manager(KVCompressOptions()), request)


def test_the_device_that_will_be_used_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later release resolves it beside the record."""
    asked = manager(KVCompressOptions())
    asked.server_args.device = None
    upstream = SimpleNamespace(resolved=lambda record: SimpleNamespace(device="cpu"))
    monkeypatch.setattr(arrival, "UPSTREAM", upstream)
    with pytest.raises(UnsupportedModeError, match="input_embeds on a CPU"):
        check_arrival(asked, GenerateReqInput(input_embeds=[[0.5] * 4]))
