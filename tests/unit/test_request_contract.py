"""SGLang's refusal of a JSON body repeats no more of it than ours."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sglang.srt import runtime_context

from sglang_kvc.config.options import KVCompressOptions
from sglang_kvc.config.server_args import OPTIONS_ATTRIBUTE
from sglang_kvc.config.shown import MOST
from sglang_kvc.patches import api_contract__generate_contract_error as patch
from sglang_kvc.requests.contract import BriefValidationError, shortened
from sglang_kvc.upstream.compat import in_force

LARGE = "x" * 1_000_000


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        ("unknown field `", "`, expected one of `n`, `stop`"),
        ('invalid type: string "', '", expected i64'),
    ],
)
@pytest.mark.parametrize("text", [LARGE, '", expected i64' * 50, "\n" * 200])
def test_only_the_clients_text_is_cut(begin: str, end: str, text: str) -> None:
    short = shortened(f"{begin}{text}{end}")
    assert len(short) <= MOST + len(end)
    left = MOST - 4 - len(begin)
    assert short == f"{begin}{text[:left]}...{end}"


def test_short_messages_stay() -> None:
    for message in ("invalid type: map, expected a string", "unknown field `x`"):
        assert shortened(message) == message
    assert shortened("unknown " + "y" * 200) == "unknown " + "y" * 88 + "...y"


class Body(BaseModel):
    """A body with one field of each kind of error."""

    model_config = ConfigDict(extra="forbid")
    count: int = 0
    names: list[int] = Field(default_factory=list)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"count": LARGE}, ("valid integer", "count", "'xxx")),
        ({LARGE: 1}, ("Extra inputs", "xxx")),
        ({"names": ["a"] * 10_000}, ("valid integer", "and 9998 more errors")),
        (LARGE, ("valid dictionary", "'xxx")),
        ({"count": [LARGE]}, ("valid integer", "['xxx")),
    ],
    ids=("value", "key", "many", "body", "nested"),
)
def test_fastapis_errors_are_told_in_brief(body: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError) as found:
        Body.model_validate(body)
    error = BriefValidationError(found.value.errors())
    told = str(error)
    assert told == str(error.errors())
    assert all(word in told for word in words)
    assert len(told) < 600


def test_what_fastapi_says_of_bad_json_stays() -> None:
    error = {
        "type": "json_invalid",
        "loc": ("body", 17),
        "msg": "JSON decode error",
        "input": {},
        "ctx": {"error": "Expecting ',' delimiter"},
    }
    short = {**error, "ctx": str(error["ctx"])}
    del short["input"]
    assert BriefValidationError([error]).errors() == [short]


def serve_with(monkeypatch: pytest.MonkeyPatch, options: Any) -> None:
    """Let this process be a server with these options."""
    server_args = SimpleNamespace(**{OPTIONS_ATTRIBUTE: options})
    monkeypatch.setattr(runtime_context, "get_server_args", lambda: server_args)


def test_off_means_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    message = f"unknown field `{LARGE}`, expected `n`"
    serve_with(monkeypatch, None)
    assert patch.hook(message, {}) is None
    serve_with(monkeypatch, KVCompressOptions())
    assert len(patch.hook(message, {}) or "") < 200
    assert patch.hook(None, {}) is None


@pytest.mark.skipif(not in_force("0.5.22"), reason="a later release has a contract")
@pytest.mark.parametrize(
    "params",
    [{LARGE: 1}, {"max_new_tokens": LARGE}, LARGE],
    ids=("key", "value", "all"),
)
def test_sglang_repeats_it_in_full(
    monkeypatch: pytest.MonkeyPatch, params: Any
) -> None:
    """Otherwise the patch can go; its words are those that we cut."""
    from sglang.srt.entrypoints import api_contract

    stock = getattr(api_contract.generate_contract_error, "__wrapped__", None)
    check = stock or api_contract.generate_contract_error
    message = check({"input_ids": [1], "sampling_params": params})
    assert message is not None
    assert len(message) > len(LARGE)
    serve_with(monkeypatch, KVCompressOptions())
    short = patch.hook(message, {}) or ""
    assert len(short) < 800
    assert short.endswith(message[-40:].rpartition("x")[2])
