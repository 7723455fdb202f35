"""Tokens per second of each rate, in rounds of their own.

The rounds that compare answers are no good for it: the first one computes the prompts
and the others find them in the prefix cache. Here every round sends all prompts at
once, at most `concurrency` running, with an ``extra_key`` of its own, so that nothing
of other rounds is cached; every request decodes as many tokens as the full cache's
answer has. The figure is decoded tokens by wall time, prefill included. One round each,
after a warm-up request; whatever else the server does meanwhile is in it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from sglang_kvc.tools.advise.asking import FULL, Run
from sglang_kvc.tools.advise.server import Server


def measure(
    server: Server,
    run: Run,
    rates: Iterable[float],
    concurrency: int,
    done: Callable[[], None] = lambda: None,
) -> dict[float, float]:
    """Tokens per second by rate, the full cache's among them.

    Parameters
    ----------
    server : Server
    run : what was asked; its prompts are sent again.
    rates : rates to measure beside the full cache.
    concurrency : most requests at once.
    done : called after every request.
    """
    lengths = [max(len(answer.tokens), 1) for answer in run.answers[FULL]]
    _send(server, run.ids[0], 1, FULL, uuid.uuid4().hex)
    found = {}
    for rate in (FULL, *rates):
        key = uuid.uuid4().hex

        def send(place: int, rate: float = rate, key: str = key) -> None:
            _send(server, run.ids[place], lengths[place], rate, key)
            done()

        start = time.perf_counter()
        with ThreadPoolExecutor(concurrency) as pool:
            list(pool.map(send, range(len(run.ids))))
        found[rate] = sum(lengths) / (time.perf_counter() - start)
    return found


def _send(server: Server, ids: list[int], length: int, rate: float, key: str) -> None:
    kv = {"enabled": False} if rate == FULL else {"rate": rate}
    params = {
        "temperature": 0,
        "max_new_tokens": length,
        "ignore_eos": True,
        "custom_params": {"kv_compress": kv},
    }
    server.generate({"input_ids": ids, "sampling_params": params, "extra_key": key})
