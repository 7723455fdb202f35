"""Options in OpenAI's metadata and in custom_labels: same checks, one order."""

from __future__ import annotations

import asyncio
import json
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.managers.io_struct import GenerateReqInput
from starlette.requests import Request

from sglang_kvc.config.options import KVCompressOptions
from sglang_kvc.config.server_args import OPTIONS_ATTRIBUTE
from sglang_kvc.errors import ConfigError
from sglang_kvc.requests.arrival import check_arrival
from sglang_kvc.requests.carried_options import (
    MAX_TEXT,
    body_of,
    carry_options,
    check_labels,
)
from tests.doubles import counting_collector

SERVER = KVCompressOptions(rate=4)


def carried(
    body: dict[str, Any], params: Any = None, labels: Any = None
) -> tuple[Any, Any]:
    """Sampling parameters and labels of a request afterwards."""
    request = GenerateReqInput(text="x", sampling_params=params, custom_labels=labels)
    carry_options(request, body, SERVER)
    return request.sampling_params, request.custom_labels


def from_metadata(value: Any) -> Any:
    """What the scheduler gets of ``metadata["kv_compress"]``."""
    params, _ = carried({"metadata": {"kv_compress": value, "user": "me"}})
    return params["custom_params"]["kv_compress"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("rate=8", {"rate": 8}),
        (" rate = 2.5 ", {"rate": 2.5}),
        ("budget=1024,report_heads=true", {"budget": 1024, "report_heads": True}),
        ("rate=8, delay=32", {"rate": 8, "delay": 32}),
        ("enabled=false", {"enabled": False}),
        ("rate=1e1", {"rate": 10.0}),
        ('{"rate": 8}', {"rate": 8}),
        ('\n{"enabled": false, "report_heads": true}', None),
        ("{}", {}),
        # A client that is no gateway may send an object.
        ({"rate": 8}, {"rate": 8}),
    ],
)
def test_ways_to_write_them(value: Any, expected: Any) -> None:
    if expected is None:
        expected = {"enabled": False, "report_heads": True}
    assert from_metadata(value) == expected


NESTED = '{"rate":' + '{"a":' * 40 + "1" + "}" * 41


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "must be key=value, several with commas"),
        ("8", "must be key=value"),
        ("rate", "must be key=value"),
        ("rate=8,", "must be key=value"),
        ("rate=8=9", "must be key=value"),
        ("rate=8;budget=64", "must be key=value|rate must be"),
        ("[8]", "must be key=value"),
        ('"rate=8"', "Unknown key|must be key=value"),
        ('{"rate": 8', "or JSON, for example"),
        ("{" * MAX_TEXT, "or JSON"),
        ('{"a":' * 51, "or JSON"),
        (NESTED, "rate must be a finite number"),
        ("rate=" + "[" * 250, "rate must be a finite number"),
        ("rate=" + "9" * 250, "rate must be"),
        ("x=1," * 60 + "x=1", "has a key twice"),
        ("rate=8,rate=8", "has a key twice, got 'rate=8,rate=8'"),
        (",".join(f"k{i}=1" for i in range(40)), "has 40 keys"),
        ("x" * (MAX_TEXT + 1), "at most 256 characters, got 257"),
        ("rate=8," * 1_000_000, "at most 256 characters, got 7000000"),
        ("{" * 3_000_000, "at most 256 characters"),
        ("\ud800=1", r"Unknown key '\\ud800'"),
        ("bugdet=64", 'Did you mean \'budget\'.*example {"kv_compress": "rate=8"}'),
        ("rate=0.5", "kv_compress.rate must be a finite number >= 1"),
        ("rate=NaN", "rate must be a finite"),
        ("rate=Infinity", "rate must be a finite"),
        ('rate="8"', "rate must be a finite"),
        ("budget=16", "needs at least 48 tokens"),
        ("enabled=False", "true or false, got 'False'"),
        ("enabled=false,rate=8", "drop one of them"),
        (None, "metadata\\['kv_compress'\\] must be an object"),
        (8, "must be an object"),
        ([["rate", 8]] * 100_000, "must be an object"),
        ({f"rate{i}": 8 for i in range(10_000)}, "has 10000 keys"),
        ({"x" * 3_000_000: 8}, "Unknown key 'xxx"),
    ],
    ids=lambda value: None,
)
def test_refused_in_brief(value: Any, message: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ConfigError, match=message) as error:
        from_metadata(value)
    assert time.perf_counter() - start < 0.1
    assert len(str(error.value)) < 400
    str(error.value).encode()


@settings(max_examples=1000, deadline=None)
@given(
    st.text(st.characters(), max_size=300)
    | st.text('{}[]":,=8.-eE ratebudgn', max_size=60)
)
def test_every_text_is_served_or_refused(text: str) -> None:
    """Any other exception is an HTTP 500."""
    try:
        asked = from_metadata(text)
    except ConfigError as error:
        assert len(str(error)) < 400
    else:
        assert set(asked) <= {"enabled", "rate", "budget", "report_heads"}


def test_others_metadata_is_left_alone() -> None:
    many = {f"key{i}": "x" for i in range(10_000)}
    for metadata in (None, {}, many, "kv_compress", 7, ["kv_compress"]):
        body = {"metadata": metadata, "custom_labels": metadata}
        assert carried(body, {"n": 2}) == ({"n": 2}, None)
        assert carried(body) == (None, None)
    assert carried({}, labels={"a": "b"}) == (None, {"a": "b"})


def test_one_order() -> None:
    """custom_params, metadata, custom_labels: the first one, as a whole."""
    both = {
        "metadata": {"kv_compress": "rate=8"},
        "custom_labels": {"kv_compress": "budget=64,report_heads=true"},
    }
    own = {"custom_params": {"kv_compress": {"enabled": False}, "other": 1}}
    assert carried(both, own)[0] == own
    assert carried(both)[0] == {"custom_params": {"kv_compress": {"rate": 8}}}
    del both["metadata"]
    asked = {"budget": 64, "report_heads": True}
    assert carried(both)[0] == {"custom_params": {"kv_compress": asked}}


def test_what_does_not_hold_is_checked_too() -> None:
    wrong = {"kv_compress": "rate=0"}
    own = {"custom_params": {"kv_compress": {"rate": 8}}}
    with pytest.raises(ConfigError, match="rate must be"):
        carried({"metadata": wrong}, own)
    with pytest.raises(ConfigError, match="rate must be"):
        carried({"metadata": {"kv_compress": "rate=8"}, "custom_labels": wrong})


def test_each_prompt_of_a_batch_may_have_its_own() -> None:
    own = {"custom_params": {"kv_compress": {"budget": 64}}}
    others = {"temperature": 0, "custom_params": {"theirs": 1}}
    params = [own, others, {}, None, {"custom_params": None}]
    after, _ = carried({"metadata": {"kv_compress": "rate=8"}}, params)
    got = [each["custom_params"] for each in after]
    assert [each["kv_compress"] for each in got] == [{"budget": 64}] + 4 * [{"rate": 8}]
    assert got[1]["theirs"] == 1
    # SGLang writes into a request's own.
    assert len({id(each) for each in got}) == 5
    # What the client's list holds is not ours to change.
    assert params[1] == {"temperature": 0, "custom_params": {"theirs": 1}}


@pytest.mark.parametrize("params", [5, "x", {"custom_params": 5}, [7]])
def test_wrong_sampling_params_are_left_to_be_refused(params: Any) -> None:
    body = {"metadata": {"kv_compress": "rate=8"}}
    assert carried(body, params)[0] == params


def test_our_label_is_not_counted() -> None:
    """Prometheus raises for a label that the metrics lack, and ends the server."""
    labels = {"kv_compress": "rate=8", "team": "a"}
    params, rest = carried({}, labels=labels)
    assert params["custom_params"] == {"kv_compress": {"rate": 8}}
    assert rest == {"team": "a"}
    assert carried({}, labels={"kv_compress": "rate=8"})[1] is None


def test_labels_of_metrics() -> None:
    known = {"model_name": "m", "team": ""}
    # Those of SGLang's header may be numbers.
    for fine in (None, {}, {"team": "a"}, {"team": 5}):
        check_labels(fine, known)
    check_labels({"other": "a"}, None)
    for wrong, message in (
        ({"other": "a"}, "has 'other', which this server does not count by"),
        ({"x" * 3_000_000: "a"}, "has 'xxx"),
        ({"team": "x" * 5000}, "custom_labels.team may have at most 4096"),
        ([], "must be an object"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            check_labels(wrong, known)
        assert len(str(error.value)) < 400


# HTTP ---------------------------------------------------------------------------------


def http_request(body: bytes, read: bool) -> Request:
    """A request as FastAPI hands it to SGLang, its body read or not."""

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0)
        return {"type": "http.request", "body": body, "more_body": False}

    request = Request({"type": "http", "headers": []}, receive)
    if read:
        asyncio.run(request.body())
    return request


def test_body_of_a_request() -> None:
    body = {"metadata": {"kv_compress": "rate=8"}}
    assert body_of(http_request(json.dumps(body).encode(), read=True)) == body


@pytest.mark.parametrize("body", [b"[1]", b"5", b"", b"{", b"\xff"])
def test_body_that_is_no_object(body: bytes) -> None:
    assert body_of(http_request(body, read=True)) == {}


@pytest.mark.parametrize("other", [None, object(), http_request(b"{}", read=False)])
def test_no_body(other: Any) -> None:
    """Of the Engine, of gRPC, or of a form that was read as it came."""
    assert body_of(other) == {}


def test_arrival_puts_them_where_sglang_takes_them() -> None:
    model = SimpleNamespace(vocab_size=1000, hidden_size=4)

    def arrive(options: KVCompressOptions | None, metrics: bool = False) -> Any:
        manager = SimpleNamespace(
            server_args=SimpleNamespace(device="cpu", **{OPTIONS_ATTRIBUTE: options}),
            model_config=model,
            context_len=4096,
            tokenizer=None,
            enable_metrics=metrics,
            metrics_collector=counting_collector(),
        )
        labels = {"kv_compress": "rate=2", "team": "a"}
        request = GenerateReqInput(input_ids=[1], custom_labels=labels)
        body = json.dumps({"metadata": {"kv_compress": "rate=8"}}).encode()
        check_arrival(manager, request, http_request(body, read=True))
        return request

    on = arrive(SERVER)
    assert on.sampling_params == {"custom_params": {"kv_compress": {"rate": 8}}}
    assert on.custom_labels == {"team": "a"}
    off = arrive(None)
    assert off.sampling_params is None
    assert off.custom_labels == {"kv_compress": "rate=2", "team": "a"}
    with pytest.raises(ConfigError, match="has 'team'"):
        arrive(SERVER, metrics=True)
