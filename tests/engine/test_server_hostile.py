"""What a client may send without harm to others: a 400 for its sender, short and soon.

Every value here ended the server, kept it from others, or came back whole in its error
message. After each one the server must answer an ordinary request.
"""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import requests

from sglang_kvc.upstream.compat import in_force
from tests.engine.server import Server, body_of

pytestmark = pytest.mark.server

IDS = [504, 2633, 1295]
VOCAB = 49152
LARGE = "x" * 3_000_000
MAX_MESSAGE = 1000
SOON_S = 20


def native(**changes: Any) -> tuple[str, dict[str, Any]]:
    """A request to /generate with other fields."""
    return "/generate", {**body_of(IDS, 2, None), **changes}


def sampled(**params: Any) -> tuple[str, dict[str, Any]]:
    """A request to /generate with other sampling parameters."""
    return native(sampling_params={"max_new_tokens": 2, "temperature": 0, **params})


def compressed(kv: Any) -> tuple[str, dict[str, Any]]:
    """A request to /generate with these options of ours."""
    return sampled(custom_params={"kv_compress": kv})


def completion(**changes: Any) -> tuple[str, dict[str, Any]]:
    """A request to OpenAI's completions."""
    body = {"model": "default", "prompt": IDS, "max_tokens": 2, "temperature": 0}
    return "/v1/completions", {**body, **changes}


def chat(**changes: Any) -> tuple[str, dict[str, Any]]:
    """A request to OpenAI's chat completions."""
    messages = [{"role": "user", "content": "Hello"}]
    body = {"model": "default", "messages": messages, "max_tokens": 2}
    return "/v1/chat/completions", {**body, **changes}


def send(server: Server, path: str, body: dict[str, Any]) -> requests.Response:
    """Post a body that may hold a nan, as Python's json module writes it."""
    headers = {"Content-Type": "application/json"}
    return requests.post(
        f"{server.url}{path}", json.dumps(body), headers=headers, timeout=60
    )


def check_refused(server: Server, request: tuple[str, Any], message: str) -> None:
    """HTTP 400, a short message, and the server goes on."""
    start = time.perf_counter()
    response = send(server, *request)
    assert time.perf_counter() - start < SOON_S
    assert response.status_code == 400, response.text[:MAX_MESSAGE]
    assert message in response.text.replace('\\"', '"')
    assert len(response.text) < MAX_MESSAGE
    check_serves(server)


def check_serves(server: Server) -> None:
    """An ordinary request is answered."""
    assert server.generate(IDS, 2)["completion_tokens"] == 2


def either(before: str, after: str) -> str:
    """The message of 0.5.17, or of releases where SGLang's JSON contract is first."""
    return after if in_force("0.5.22") else before


OPTIONS: list[tuple[Any, str]] = [
    ({"budget": 2**63}, "kv_compress.budget must be an integer >= 1, at most"),
    ({"budget": 2**63 - 64}, "kv_compress.budget must be"),
    ({"budget": 10**300}, "kv_compress.budget must be"),
    ({"rate": 10**300}, "kv_compress.rate must be a finite number"),
    ({"rate": 1e300}, "kv_compress.rate must be a finite number"),
]


@pytest.mark.parametrize(("kv", "message"), OPTIONS, ids=lambda value: "")
def test_a1_numbers_that_no_request_can_reach(
    server: Server, kv: Any, message: str
) -> None:
    check_refused(server, compressed(kv), message)


@pytest.mark.parametrize("kv", [{"budget": 1 << 30}, {"rate": float(1 << 30)}])
def test_a1_the_largest_numbers_are_served(server: Server, kv: Any) -> None:
    info = server.generate(IDS * 40, 2, kv)["kv_compress"]
    assert info["enabled"]


UNCOMPUTABLE: list[tuple[Any, str]] = [
    # The prompt.
    (native(input_ids=[VOCAB]), "input_ids must be in 0..49151"),
    (native(input_ids=[5, -1]), "got -1 at position 1"),
    (native(input_ids=[[5], [10**9]]), "got 1000000000 at position 0"),
    (completion(prompt=[VOCAB + 7]), "input_ids must be in 0..49151"),
    (completion(prompt=[[5], [-7]], stream=True), "got -7 at position 0"),
    (native(input_ids=[[5], []]), "has no tokens"),
    (completion(prompt=[[5], []]), "has no tokens"),
    (native(input_ids=None, input_embeds=[[0.5] * 576]), "input_embeds on a CPU"),
    (native(input_ids=None, input_embeds=[[0.5], [0.5, 1]]), "on a CPU"),
    (native(positional_embed_overrides=7), "positional_embed_overrides"),
    (
        native(positional_embed_overrides={"embeds": [[1.0]], "positions": [0]}),
        "positional_embed_overrides",
    ),
    # Sampling.
    (sampled(top_k=2**40, temperature=1), "sampling_params.top_k must be"),
    (chat(top_k=2**40), "sampling_params.top_k must be"),
    (sampled(min_new_tokens=2, stop_token_ids=[VOCAB]), "stop_token_ids"),
    (chat(min_tokens=2, stop_token_ids=[-5]), "stop_token_ids"),
    (
        sampled(max_new_tokens=1.5),
        either("max_new_tokens must be an integer", "point `1.5`, expected i64"),
    ),
    (sampled(logit_bias={"5": "abc"}), either("logit_bias", '"abc", expected f64')),
    (sampled(logit_bias={"5": 1e300}, temperature=1), "logit_bias"),
    (chat(logit_bias={"5": 1e39}), "logit_bias"),
    (
        sampled(logit_bias=[1]),
        either("logit_bias must be an object", "sequence, expected a map"),
    ),
    (sampled(repetition_penalty=1e-40, temperature=1), "repetition_penalty"),
    (sampled(temperature=10**300), "temperature"),
    (sampled(temperature=1e300), "temperature"),
    (
        sampled(is_normalized=True),
        either("Unknown sampling parameter", "unknown field `is_normalized`"),
    ),
    (sampled(stream_interval="a"), either("stream_interval", '"a", expected i64')),
    (
        sampled(stop=[5]),
        either("sampling_params.stop must be", "integer `5`, expected a string"),
    ),
    (
        sampled(json_schema={"type": "object"}),
        either("json_schema must be a string", "map, expected a string"),
    ),
    (sampled(custom_params=7), "custom_params must be an object"),
    # Log probabilities.
    (native(return_logprob=True, top_logprobs_num=10**6), "top_logprobs_num"),
    (native(return_logprob=True, top_logprobs_num=-1), "top_logprobs_num"),
    (native(return_logprob=True, top_logprobs_num=[5]), "entries for one prompt"),
    (completion(logprobs=10**6), "top_logprobs_num"),
    (native(return_logprob=True, token_ids_logprob=[VOCAB]), "token_ids_logprob"),
    (native(return_logprob=True, logprob_start_len=2**70), "logprob_start_len"),
    # More than there is room for.
    (sampled(n=10**9), "sampling_params.n must be an integer in 1..1024"),
    (chat(n=10**9), "sampling_params.n must be"),
    (sampled(n=0), "sampling_params.n must be"),
    (sampled(stop_regex="(a|a)*$x"), "repeats without an end"),
    (sampled(stop=["x"] * 100_000), "at most 64 entries"),
    (sampled(regex="(" * 500 + ")" * 500), "may nest at most 64"),
    (sampled(regex="[a-z]?" * 200), "at most 64 of"),
    # Who is who.
    (native(session_params={"id": ["x"]}), "session_params.id must be a string"),
    (native(rid=""), "could begin the rid of another request"),
    (native(rid="a"), "could begin the rid of another request"),
    (native(priority=2**70), "priority"),
]


@pytest.mark.parametrize(("request_", "message"), UNCOMPUTABLE, ids=lambda value: "")
def test_a5_what_cannot_be_computed_is_refused(
    server: Server, request_: Any, message: str
) -> None:
    check_refused(server, request_, message)


UNSERVED: list[tuple[Any, str]] = [
    (native(input_ids=IDS * 200, bootstrap_host="10.0.0.1"), "bootstrap_host"),
    (completion(bootstrap_host="10.0.0.1", bootstrap_room=1), "bootstrap_host"),
    (native(bootstrap_port=8998), "bootstrap_port"),
    (native(image_data="http://127.0.0.1:1/x.png"), "image_data"),
    (native(http_worker_ipc="ipc://elsewhere"), "http_worker_ipc"),
    (native(lora_id="x"), "lora_id"),
    (native(return_routed_experts=True), "return_routed_experts"),
    (
        sampled(beam_width=4),
        either("Unknown sampling parameter", "does not serve beam search"),
    ),
    (native(multi_item_delimiter_indices=[1]), "multi_item_delimiter_indices"),
]


@pytest.mark.parametrize(("request_", "message"), UNSERVED, ids=lambda value: "")
def test_a5_unserved_fields_are_refused_by_name(
    server: Server, request_: Any, message: str
) -> None:
    check_refused(server, request_, message)


SGLANG: list[tuple[Any, str]] = [
    (native(lora_path="adapter"), "LoRA is not enabled"),
    (completion(model="default:adapter"), "LoRA is not enabled"),
    (native(custom_logit_processor="x"), "custom logit processor"),
    (native(return_hidden_states=True), "not configured to return hidden states"),
    (native(session_params={"id": "nobody"}), "does not exist"),
    (native(routed_dp_rank=3), "out of range"),
    (native(input_ids=[5] * 10_000), "longer than"),
    ((native()[0], {"text": ""}), either("cannot be empty", "has no tokens")),
    (sampled(logit_bias={"5": float("nan")}, temperature=1), "json_invalid"),
    (sampled(temperature=10**400), "json_invalid"),
    ((native()[0], {"text": "a\ud800"}), "json_invalid"),
    (completion(prompt="a\ud800"), "json_invalid"),
    (compressed({"\ud800": 1}), "json_invalid"),
    (compressed({"budget": 10**1000}), "json_invalid"),
    (sampled(regex="("), "Failed to compile regex grammar"),
    (sampled(json_schema="{"), "Failed to compile json grammar"),
]


@pytest.mark.parametrize(("request_", "message"), SGLANG, ids=lambda value: "")
def test_a5_sglang_refuses_the_rest(
    server: Server, request_: Any, message: str
) -> None:
    check_refused(server, request_, message)


def test_a5_in_a_stream_the_error_is_the_only_event(server: Server) -> None:
    """SGLang has sent HTTP 200 by then."""
    response = send(server, *native(input_ids=[VOCAB], stream=True))
    (event, done) = response.text.strip().split("\n\n")
    assert done == "data: [DONE]"
    error = json.loads(event.removeprefix("data: "))["error"]
    assert error["code"] == 400
    assert "input_ids must be in" in error["message"]
    check_serves(server)


HUGE: list[tuple[Any, str]] = [
    (compressed(LARGE), "must be an object"),
    (compressed({"rate": LARGE}), "kv_compress.rate must be"),
    (compressed({"enabled": [LARGE]}), "true or false"),
    (compressed({LARGE: 1}), "Unknown key 'xxx"),
    (compressed({f"rate{i}": 1 for i in range(10_000)}), "has 10000 keys"),
    (compressed({"\n\0": 1}), "Unknown key"),
    (
        sampled(**{LARGE: 1}),
        either("Unknown sampling parameter", "unknown field `xxx"),
    ),
    (
        sampled(max_new_tokens=LARGE),
        either("max_new_tokens must be an integer", 'x...", expected i64'),
    ),
    (sampled(stop=LARGE), "at most 64 entries of 1024 characters"),
    (sampled(regex=LARGE), "sampling_params.regex may have at most"),
    (native(rid=LARGE), "rid may have at most 256 characters"),
    (native(extra_key=LARGE), "extra_key may have at most"),
    ((native()[0], {"text": LARGE}), "3000000 characters, more than can fit"),
    ((native()[0], {"text": "1" * 1_000_000}), "1000000 characters has more than"),
    (completion(prompt=["2" * 1_000_000]), "1000000 characters has more than"),
    (native(input_ids=[VOCAB] * 300_000), "got 49152 at position 0"),
    # Bodies of the wrong shape.
    (native(sampling_params=LARGE), "'sampling_params'"),
    (native(stream=LARGE), "'stream'"),
    (native(input_ids=LARGE), "'input_ids'"),
    (completion(max_tokens=LARGE), "valid integer"),
    (completion(stop=[["x"]] * 100_000), "more errors"),
    (chat(messages=LARGE), "valid list"),
    (chat(messages=[{"role": LARGE, "content": LARGE}]), "'messages', 0"),
    (chat(tools=["x"] * 100_000), "and 99998 more errors"),
]


@pytest.mark.parametrize(("request_", "message"), HUGE, ids=lambda value: "")
def test_c7_megabytes_in_a_short_message_out(
    server: Server, request_: Any, message: str
) -> None:
    check_refused(server, request_, message)


def test_a_refused_stream_leaves_its_connection_whole(server: Server) -> None:
    """SGLang comes back to a stream after two seconds; the next request is there."""
    path, body = compressed({"rate": 0.5})
    with requests.Session() as session:
        refused = session.post(f"{server.url}{path}", json={**body, "stream": True})
        assert "rate" in refused.text
        begin = time.monotonic()
        while time.monotonic() < begin + 4:
            path, body = native(
                sampling_params={"max_new_tokens": 12, "ignore_eos": True}
            )
            answer = session.post(f"{server.url}{path}", json=body, timeout=60)
            assert answer.status_code == 200
