"""Greedy outputs of stock SGLang, made in a process of its own.

``python -m tests.engine.stock MODEL REQUESTS.json OUT.json`` serves the requests with
torch_native attention (no plugin flag) and writes ids and top-2 log-probabilities.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from tests.engine.inprocess import (
    InProcessScheduler,
    Output,
    Request,
    make_server_args,
)

NEAR_TIE = 1e-3


def without_options(requests: Iterable[Request]) -> list[Request]:
    """The same requests for stock SGLang, which also tells the two best tokens."""
    return [replace(request, kv=None, top_logprobs=2) for request in requests]


def diverging_ids(ours: Mapping[str, Output], stock: Mapping[str, Output]) -> list[str]:
    """Requests that are answered otherwise because two tokens were as likely.

    Parameters
    ----------
    ours : by request.
    stock : the same, with the two best log-probabilities at each place.

    Raises
    ------
    AssertionError
        If an answer differs where they were not.
    """
    diverging = []
    for rid, out in stock.items():
        if ours[rid].ids == out.ids:
            continue
        pairs = enumerate(zip(ours[rid].ids, out.ids, strict=True))
        first = next(i for i, (a, b) in pairs if a != b)
        (a, _), (b, _) = out.top_logprobs[first][:2]
        assert abs(a - b) < NEAR_TIE, f"{rid} differs at {first}, gap {abs(a - b):.2e}"
        diverging.append(rid)
    return diverging


def main(model: str, requests: str, target: str) -> None:
    """Serve `requests` and write `target`."""
    scheduler = InProcessScheduler(make_server_args(model, compress=False))
    batch = [Request(**fields) for fields in json.loads(Path(requests).read_text())]
    outputs = scheduler.serve(batch)
    result = {
        rid: {"ids": out.ids, "top": out.top_logprobs, "cached": out.cached_tokens}
        for rid, out in outputs.items()
    }
    Path(target).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
