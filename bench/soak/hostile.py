"""Requests that a server has to refuse with HTTP 400, by kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.soak.limits import Limits

MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Hostile:
    """One kind.

    Parameters
    ----------
    kind : str
        Its name in tables, and for ``--without``.
    change : callable
        Takes a good body and the server's limits, and changes the body in place.
    short : bool
        Whether the answer must not repeat what was sent.
    streams : bool
        Whether it may be sent as a stream, too.
    only_bare : bool
        Whether it is legal where there is a tokenizer.
    """

    kind: str
    change: Callable[[dict[str, Any], Limits], None]
    short: bool = False
    streams: bool = True
    only_bare: bool = False

    def spoil(self, body: dict[str, Any], limits: Limits) -> bytes:
        """The changed body as JSON (Python's: NaN and any integer are written)."""
        self.change(body, limits)
        return json.dumps(body).encode()


def _option(kind: str, value: Any) -> Hostile:
    """A wrong ``kv_compress`` entry."""

    def change(body: dict[str, Any], limits: Limits) -> None:
        del limits
        body["sampling_params"]["custom_params"] = {"kv_compress": value}

    return Hostile(kind, change, short=True)


def _param(kind: str, **values: Any) -> Hostile:
    """Wrong sampling parameters of SGLang's own."""

    def change(body: dict[str, Any], limits: Limits) -> None:
        del limits
        body["sampling_params"].update(values)

    return Hostile(kind, change)


def _field(kind: str, **values: Any) -> Hostile:
    """Wrong fields of the request."""

    def change(body: dict[str, Any], limits: Limits) -> None:
        del limits
        body.update(values)

    return Hostile(kind, change, streams=False)


def _beyond_vocabulary(body: dict[str, Any], limits: Limits) -> None:
    body["input_ids"][-1] = limits.vocab + 17


def _beyond_context(body: dict[str, Any], limits: Limits) -> None:
    body["input_ids"] = [7] * (limits.context + 8)


OPTIONS = (
    _option("rate below one", {"rate": 0.5}),
    _option("rate zero", {"rate": 0}),
    _option("rate negative", {"rate": -4}),
    _option("rate NaN", {"rate": float("nan")}),
    _option("rate infinite", {"rate": float("inf")}),
    _option("rate a string", {"rate": "8"}),
    _option("rate true", {"rate": True}),
    _option("rate a list", {"rate": [8]}),
    _option("rate of a megabyte", {"rate": "8" * MEGABYTE}),
    _option("budget zero", {"budget": 0}),
    _option("budget negative", {"budget": -(2**63)}),
    _option("budget too small", {"budget": 16}),
    _option("budget a float", {"budget": 64.5}),
    _option("budget true", {"budget": True}),
    _option("budget 2**63", {"budget": 2**63}),
    _option("budget 2**63 - 1", {"budget": 2**63 - 1}),
    _option("budget of a thousand digits", {"budget": 10**1000}),
    _option("rate and budget", {"rate": 8, "budget": 1024}),
    _option("off with a rate", {"enabled": False, "rate": 8}),
    _option("answer negative", {"answer": -1}),
    _option("off with an answer", {"enabled": False, "answer": 8}),
    _option("delay negative", {"delay": -1}),
    _option("delay too long", {"delay": 1 << 20}),
    _option("off with a delay", {"enabled": False, "delay": 8}),
    _option("enabled a string", {"enabled": "no"}),
    _option("enabled zero", {"enabled": 0}),
    _option("report_heads a number", {"report_heads": 1}),
    _option("unknown key", {"bugdet": 64}),
    _option("empty key", {"": 1}),
    _option("key of a megabyte", {"r" * MEGABYTE: 8}),
    _option("a thousand keys", {f"rate{i}": 8 for i in range(1000)}),
    _option("entry a number", 8),
    _option("entry a list", [{"rate": 8}]),
    _option("entry a string of a megabyte", "8" * MEGABYTE),
    _option("entry nested", {"rate": {"rate": {"rate": 8}}}),
)
"""All of them about our own options."""
HOSTILE = (
    *OPTIONS,
    _param("temperature negative", temperature=-1),
    _param("top_p two", top_p=2),
    _param("output negative", max_new_tokens=-1),
    _param("minimum above maximum", min_new_tokens=64, max_new_tokens=8),
    _field("no prompt", input_ids=None),
    _field("empty prompt", input_ids=[]),
    _field("token ids are words", input_ids=["a", "b"]),
    _field("bootstrap host", bootstrap_host="127.0.0.1", bootstrap_room=1),
    _field("hidden states", return_hidden_states=True),
    Hostile("token beyond the vocabulary", _beyond_vocabulary),
    Hostile("prompt beyond the context", _beyond_context),
    Hostile(
        "regex without a tokenizer",
        _param("", regex="[0-9]+").change,
        only_bare=True,
    ),
)
