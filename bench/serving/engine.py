"""One engine in a process of its own, driven by JSON lines; `child` drives it.

It reads one command per line from its standard input and answers one JSON line on the
file descriptor ``--answer-fd``. Standard output and error are SGLang's log.

Commands (``op``): ``run``, ``itl`` and ``first`` serve prompts, see
`loads.Load.command`; ``answers`` gives back the tokens, see `agreement`; ``alive`` is a
small request, ``flush`` empties the prefix
cache, ``quit`` ends the child, as does the end of its input.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from bench.serving.loads import make_prompts

SWITCH = "kv_compress"
PLUGIN_MODULE = "sglang_kvc.plugin"
REST_SECONDS = 0.5
"""Before each of the first requests of a server."""


class Seen(NamedTuple):
    """A part of a streamed answer: when it came, and how many tokens there were."""

    at: float
    tokens: int


def main() -> None:
    """The child: start the engine, answer commands until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", required=True, help="JSON, keywords of Engine")
    parser.add_argument("--answer-fd", type=int, required=True)
    args = parser.parse_args()
    # SGLang's processes inherit neither end, so that the parent sees this one die.
    os.set_inheritable(args.answer_fd, False)
    commands = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    answers = os.fdopen(args.answer_fd, "w", buffering=1)
    started = time.perf_counter()
    try:
        server = Server(json.loads(args.engine))
    except Exception as problem:
        answers.write(json.dumps({"error": f"start: {problem!r}"[:2000]}) + "\n")
        raise
    ready = {
        "ready_s": time.perf_counter() - started,
        "plugin_loaded": PLUGIN_MODULE in sys.modules,
    }
    answers.write(json.dumps(ready) + "\n")
    print(f"ready after {ready['ready_s']:.0f} s", flush=True)  # in the log
    for line in commands:
        command = json.loads(line)
        if command["op"] == "quit":
            break
        try:
            answer = getattr(server, command["op"])(command)
        except Exception as problem:
            # The parent decides: a refused prompt is a result, a dead engine is not.
            answer = {"failed": f"{type(problem).__name__}: {problem}"[:1000]}
        answers.write(json.dumps(answer) + "\n")
    server.engine.shutdown()


class Server:
    """The commands, on one engine."""

    def __init__(self, keywords: dict[str, Any]) -> None:
        import sglang

        self.engine = sglang.Engine(**keywords)
        config = json.loads((Path(keywords["model_path"]) / "config.json").read_text())
        self.vocab: int = config["vocab_size"]

    def run(self, command: dict[str, Any]) -> dict[str, Any]:
        """Serve all prompts at once."""
        ids = make_prompts(command, self.vocab)
        begin = time.perf_counter()
        outputs = self.engine.generate(
            input_ids=ids, sampling_params=sampling_params(command)
        )
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, **summarize(ids, [o["meta_info"] for o in outputs])}

    def first(self, command: dict[str, Any]) -> dict[str, Any]:
        """Serve the prompts one after another, as the first ones of a server.

        A server sends itself a request of a few tokens before it says that it is
        ready; an Engine does not, so that request is sent here. All of them find a
        machine that has rested as long: else only the first one would.
        """
        self.engine.generate(
            input_ids=[10, 11, 12],
            sampling_params={"temperature": 0, "max_new_tokens": 8},
        )
        ids = make_prompts(command, self.vocab)
        times, info = [], []
        for prompt in ids:
            time.sleep(REST_SECONDS)
            begin = time.perf_counter()
            output = self.engine.generate(
                input_ids=prompt, sampling_params=sampling_params(command)
            )
            times.append(time.perf_counter() - begin)
            info.append(output["meta_info"])
        return {"seconds": sum(times), "each_s": times, **summarize(ids, info)}

    def itl(self, command: dict[str, Any]) -> dict[str, Any]:
        """Stream all prompts; latencies between tokens once all have started."""
        import asyncio

        ids = make_prompts(command, self.vocab)
        params = sampling_params(command)

        async def stream(prompt: list[int]) -> tuple[list[Seen], Any]:
            seen: list[Seen] = []
            info: dict[str, Any] = {}
            outputs = await self.engine.async_generate(
                input_ids=prompt, sampling_params=params, stream=True
            )
            async for output in outputs:
                info = output["meta_info"]
                seen.append(Seen(time.perf_counter(), info["completion_tokens"]))
            return seen, info

        async def everything() -> list[Any]:
            return await asyncio.gather(*map(stream, ids))

        begin = time.perf_counter()
        results = self.engine.loop.run_until_complete(everything())
        seconds = time.perf_counter() - begin
        return {
            "seconds": seconds,
            **token_gaps([seen for seen, _ in results]),
            **summarize(ids, [info for _, info in results]),
        }

    def answers(self, command: dict[str, Any]) -> dict[str, Any]:
        """Token ids that come back for given prompts, all sent at once."""
        outputs = self.engine.generate(
            input_ids=command["prompts"], sampling_params=command["params"]
        )
        return {"ids": [output["output_ids"] for output in outputs]}

    def alive(self, command: dict[str, Any]) -> dict[str, Any]:
        """A small request; answers how many tokens came back."""
        del command
        output = self.engine.generate(
            input_ids=list(range(10, 42)),
            sampling_params={"max_new_tokens": 8, "ignore_eos": True},
        )
        return {"tokens": len(output["output_ids"])}

    def flush(self, command: dict[str, Any]) -> dict[str, Any]:
        """Empty the prefix cache; the scheduler may need a moment to become idle."""
        del command
        for _ in range(20):
            if self.engine.flush_cache().success:
                return {"flushed": True}
            time.sleep(0.1)
        return {"failed": "the cache could not be flushed"}


def sampling_params(command: dict[str, Any]) -> dict[str, Any]:
    """Fixed output length; the rate, if any, as a request would ask for it."""
    params: dict[str, Any] = {
        "max_new_tokens": command["output_len"],
        "ignore_eos": True,
        "temperature": 0.0,
    }
    if command["rate"] is not None:
        params["custom_params"] = {SWITCH: {"rate": command["rate"]}}
    return params


def summarize(ids: list[list[int]], info: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of the outputs, and means and sums of what our plugin reports."""
    ours = [one[SWITCH] for one in info if SWITCH in one]
    aborted = [
        str(one["finish_reason"].get("message"))
        for one in info
        if (one.get("finish_reason") or {}).get("type") == "abort"
    ]
    result: dict[str, Any] = {
        "input_tokens": sum(map(len, ids)),
        "lengths": [one["completion_tokens"] for one in info],
        "cached_tokens": sum(one.get("cached_tokens") or 0 for one in info),
        "compressed": len(ours),
    }
    ranks = Counter(one["dp_rank"] for one in info if one.get("dp_rank") is not None)
    if len(ranks) > 1:
        result["replicas"] = [ranks[rank] for rank in sorted(ranks)]
    if aborted:
        result["failed"] = aborted[0][:1000]
    for key in ("logical_tokens", "resident_tokens", "peak_resident_tokens"):
        if ours:
            result[key] = sum(one[key] for one in ours) / len(ours)
    for key in ("passes", "deferred_passes"):
        if ours:
            result[key] = sum(one[key] for one in ours)
    return result


def token_gaps(streams: list[list[Seen]]) -> dict[str, Any]:
    """Median and tail of the time between tokens after the last first token.

    Parameters
    ----------
    streams : list of list of Seen
        The parts of every request's answer, one list a request. A part with several
        tokens counts as one gap; such parts are counted.
    """
    import numpy

    start = max(parts[0].at for parts in streams)
    gaps, several = [], 0
    for parts in streams:
        for last, part in pairwise(parts):
            new = part.tokens - last.tokens
            if last.at >= start and new > 0:
                gaps.append((part.at - last.at) * 1000)
                several += new > 1
    if not gaps:
        return {"failed": "no two tokens after the last first token"}
    median, p99 = (float(numpy.percentile(gaps, q)) for q in (50, 99))
    return {
        "itl_median_ms": median,
        "itl_p99_ms": p99,
        "itl_max_ms": max(gaps),
        "itl_p99_over_median": p99 / median,
        "itl_gaps": len(gaps),
        "itl_gaps_of_several": several,
    }


if __name__ == "__main__":
    main()
