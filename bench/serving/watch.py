"""What ``/metrics`` shows while a load runs, over time: one record, one picture.

``python -m bench.serving.watch --url URL --out FILE.png`` sends a load to a server that
runs already (with ``--kv-compress --enable-metrics`` and, so that its gauges follow,
``--decode-log-interval 4``), looks at ``/metrics`` every half second and draws tokens,
their ratio, running requests and passes. ``--draw-only`` draws the last record again.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests
from prometheus_client.parser import text_string_to_metric_families

from bench.common.plotting import COLORS, caption_of, load_pyplot, write_png
from bench.common.record import ROOT, environment, read_lines, write_record
from sglang_kvc.config import series
from sglang_kvc.errors import KVCError
from sglang_kvc.tools.server_http import Http

TIMEOUT_S = 3600
FIRST_ID, LAST_ID = 1000, 20_000
"""Tokens of prompts: random ones of any vocabulary."""
RUNNING, QUEUED = "sglang:num_running_reqs", "sglang:num_queue_reqs"
GAUGES = {
    "logical": series.LOGICAL.name,
    "resident": series.RESIDENT.name,
    "running": RUNNING,
    "queued": QUEUED,
}
COUNTERS = {
    "passes": series.PASSES.name,
    "deferred": series.DEFERRED.name,
    "pass_seconds": series.SECONDS.name,
}

Sample = dict[str, float]


def read_metrics(text: str) -> Sample:
    """Gauges and counters of a look at ``/metrics``, added up over processes."""
    by_name: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            by_name[sample.name] = by_name.get(sample.name, 0.0) + sample.value
    names = {**GAUGES, **COUNTERS}
    lacking = [name for name in names.values() if name not in by_name]
    if lacking:
        raise SystemExit(
            f"/metrics lacks {', '.join(lacking)}: start the server with "
            "--kv-compress --enable-metrics"
        )
    return {short: by_name[name] for short, name in names.items()}


def watch(url: str, every: float, ended: threading.Event) -> list[Sample]:
    """Look until `ended`, then once more; seconds from the start, counters from 0."""
    start, samples = time.monotonic(), []
    while True:
        last = ended.is_set()
        answer = requests.get(f"{url}/metrics", timeout=TIMEOUT_S)
        answer.raise_for_status()
        found = read_metrics(answer.text)
        samples.append({"t": round(time.monotonic() - start, 2), **found})
        if last:
            break
        ended.wait(every)
    first = {name: samples[0][name] for name in COUNTERS}
    for sample in samples:
        for name, value in first.items():
            sample[name] = round(sample[name] - value, 4)
    return samples


def send(url: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Send a request every `gap` seconds; the summaries of what was kept."""
    rng = random.Random(args.seed)

    def ask(ids: list[int]) -> dict[str, Any]:
        params = {
            "temperature": 0,
            "max_new_tokens": args.output,
            "ignore_eos": True,
        }
        body = {"input_ids": ids, "sampling_params": params}
        answer = requests.post(f"{url}/generate", json=body, timeout=TIMEOUT_S)
        answer.raise_for_status()
        kept: dict[str, Any] = answer.json()["meta_info"]["kv_compress"]
        return kept

    with ThreadPoolExecutor(args.requests) as pool:
        answers = []
        for _ in range(args.requests):
            length = rng.randint(args.min_len, args.max_len)
            ids = [rng.randint(FIRST_ID, LAST_ID) for _ in range(length)]
            answers.append(pool.submit(ask, ids))
            time.sleep(args.gap)
        return [answer.result() for answer in answers]


def draw(record: dict[str, Any], path: Path) -> None:
    """Four panels over seconds."""
    plt = load_pyplot()
    samples = record["samples"]
    seconds = [sample["t"] for sample in samples]
    figure, axes = plt.subplots(2, 2, figsize=(7, 4.6), sharex=True)
    panels = (
        ("tokens of running requests", ("logical", "resident")),
        ("logical by resident tokens", ("ratio",)),
        ("requests", ("running", "queued")),
        ("passes since the start", ("passes", "deferred")),
    )
    for panel, (title, names) in zip(axes.flat, panels, strict=True):
        for name, color in zip(names, COLORS, strict=False):
            values = [value_of(sample, name) for sample in samples]
            panel.step(seconds, values, where="post", color=color, label=name)
        panel.set_title(title, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        if len(names) > 1:
            panel.legend(fontsize=8, frameon=False)
    for panel in axes[1]:
        panel.set_xlabel("seconds", fontsize=8)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    caption = caption_of([{**record, "gpu": record["gpu"] or "CPU"}])
    figure.text(0.5, 0.015, caption, ha="center", fontsize=8, color="dimgrey")
    write_png(figure, path)
    plt.close(figure)


def value_of(sample: Sample, name: str) -> float:
    """A figure of one look; the ratio has no value while nothing runs."""
    if name != "ratio":
        return sample[name]
    return (
        sample["logical"] / sample["resident"] if sample["resident"] else float("nan")
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:30000")
    add("--requests", type=int, default=24)
    add("--min-len", type=int, default=600)
    add("--max-len", type=int, default=1800)
    add("--output", type=int, default=96)
    add("--gap", type=float, default=1.0, help="seconds between two requests")
    add("--every", type=float, default=0.5, help="seconds between two looks")
    add("--seed", type=int, default=0)
    add("--out", type=Path, required=True, metavar="FILE.png")
    add("--record", type=Path, default=ROOT / "bench/results/watch.jsonl")
    add("--draw-only", action="store_true")
    args = parser.parse_args()
    if args.draw_only:
        draw(read_lines(args.record)[-1], args.out)
        return
    try:
        server = server_of(args.url)
    except KVCError as error:
        raise SystemExit(str(error)) from None
    ended = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch, args.url, args.every, ended)
        try:
            kept = send(args.url, args)
        finally:
            ended.set()
        samples = watching.result()
    load = ("requests", "min_len", "max_len", "output", "gap", "every", "seed")
    record = {
        **environment(),
        "bench": "watch",
        "settings": {name: getattr(args, name) for name in load},
        "server": server,
        "resident_tokens": sum(it["resident_tokens"] for it in kept),
        "logical_tokens": sum(it["logical_tokens"] for it in kept),
        "passes": sum(it["passes"] for it in kept),
        "samples": samples,
    }
    write_record(args.record, record)
    draw(record, args.out)


def server_of(url: str) -> dict[str, Any]:
    """What a reader has to know of the server: the plugin's options, pool and model."""
    info = Http(url).json("/server_info")
    names = ("tp_size", "device", "max_total_num_tokens", "chunked_prefill_size")
    found = {name: info.get(name) for name in names}
    model = Path(str(info.get("model_path"))).name
    return {**found, "model": model, "kv_compress": info.get("kv_compress")}


if __name__ == "__main__":
    main()
