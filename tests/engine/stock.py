"""Greedy outputs of stock SGLang, made in a process of its own.

``python -m tests.engine.stock MODEL REQUESTS.json OUT.json`` serves the requests with
torch_native attention (no plugin flag) and writes ids and top-2 log-probabilities.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.engine.inprocess import InProcessScheduler, Request, make_server_args


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
