"""The loads of `bench.serving`: what is served, by which engines, and what is aimed at.

A load is fixed numbers only; prompts follow from its seed, so that both systems and all
rates get the same ones.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

STOCK, ABSENT, OURS = "stock", "absent", "kvc"
"""Plugin not loaded; plugin loaded, flag not given; flag given."""
SMALL_GROUP, ALL_GROUP, FLAG_GROUP = EVERY = ("small", "all", "flag")
LARGE_GROUP, BYTES_GROUP = "70b", "bytes"
"""For ``bench/shapes/llama-3.1-70b`` and ``-fp8``, and bf16 beside e4m3 caches of
equal bytes; not in "every"."""
GROUPS = (*EVERY, LARGE_GROUP, BYTES_GROUP)
FP8 = {"kv_cache_dtype": "fp8_e4m3"}
PAPER_MIN_BUDGET = 128
DEFAULT_MIN_BUDGET = 512


@dataclass(frozen=True)
class Load:
    """One load.

    Parameters
    ----------
    id : str
        Name on the command line and in the records.
    prompts : int
        Requests, all sent at once.
    input_len, output_len : int
        Tokens of each request; the output length is forced.
    pool : int
        Tokens of the KV pool; 0 is all memory of the device.
    rates : tuple of float
        Compression rates, most important first: a deadline cuts the end off.
    stock_prompts : int
        Requests that stock serves (0: as many as ours); figures are compared by tokens
        per second, so fewer requests of a slow system save device time.
    rate_prompts : dict
        Other numbers of requests at some rates of ours.
    group : str
        Which engines serve it, see `bench.serving`.
    mode : {"run", "itl", "first"}
        A batch; a streamed batch, for inter-token latency; one request after another,
        right after the engine is ready.
    systems : tuple of str
        The first one is what the others are compared with.
    min_budget : int
        Server setting of ours for this load.
    engine : dict
        Further engine keywords of ours. An engine of its own serves such loads.
    shared : dict
        Further engine keywords of every system; likewise.
    seconds : dict
        Expected device seconds by rate (0: stock and the plugin without its flag).
    targets, step_targets : dict
        By rate: aim for tokens per second over stock, and for stock's decode step over
        ours. 0 stands for the plugin without its flag.
    min_input_len : int
        If given, lengths are uniform between this and `input_len`.
    seed : int
        Added to the seed that comes from the shape.
    """

    id: str
    prompts: int
    input_len: int
    output_len: int
    pool: int
    rates: tuple[float, ...]
    stock_prompts: int = 0
    rate_prompts: dict[float, int] = field(default_factory=dict)
    group: str = ALL_GROUP
    mode: str = "run"
    systems: tuple[str, ...] = (STOCK, OURS)
    min_budget: int = DEFAULT_MIN_BUDGET
    engine: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    seconds: dict[float, float] = field(default_factory=dict)
    targets: dict[float, float] = field(default_factory=dict)
    step_targets: dict[float, float] = field(default_factory=dict)
    min_input_len: int = 0
    seed: int = 0

    def count(self, system: str, rate: float) -> int:
        """Requests that `system` serves at `rate`."""
        if system == OURS:
            return self.rate_prompts.get(rate, self.prompts)
        return self.stock_prompts or self.prompts

    def expected(self, rate: float) -> float:
        """Seconds to reserve before the run was ever measured; a guess is 60."""
        return self.seconds.get(rate, max(self.seconds.values(), default=60.0))

    @property
    def prompt_seed(self) -> int:
        """Seed of the prompts, the same for loads of one shape whatever their names."""
        shape = f"{self.min_input_len}-{self.input_len}+{self.output_len}"
        return zlib.crc32(shape.encode()) + self.seed

    def command(self, system: str, rate: float) -> dict[str, Any]:
        """Command for the engine's process (`engine`)."""
        return {
            "op": self.mode,
            "prompts": self.count(system, rate),
            "input_len": self.input_len,
            "min_input_len": self.min_input_len,
            "output_len": self.output_len,
            "seed": self.prompt_seed,
            "rate": rate if system == OURS else None,
        }


def make_prompts(command: dict[str, Any], vocab: int) -> list[list[int]]:
    """Random token ids. Fewer prompts are the first ones of more."""
    import numpy

    rng = numpy.random.default_rng(command["seed"])
    low, high = command["min_input_len"] or command["input_len"], command["input_len"]
    prompts = []
    for _ in range(command["prompts"]):
        length = int(rng.integers(low, high + 1))
        prompts.append(rng.integers(10, vocab - 10, length).tolist())
    return prompts


def _paper(
    load: str,
    prompts: int,
    shape: tuple[int, int],
    pool: int,
    group: str = SMALL_GROUP,
    **rest: Any,
) -> Load:
    return Load(
        load,
        prompts,
        *shape,
        pool,
        group=group,
        min_budget=PAPER_MIN_BUDGET,
        **rest,
    )


LOADS: dict[str, Load] = {
    load.id: load
    for load in (
        _paper(
            "6000x500@20480",
            128,
            (6000, 500),
            20480,
            rates=(8, 64, 16, 4, 32, 2, 1),
            stock_prompts=32,
            # About as slow as stock, so fewer.
            rate_prompts={1: 32, 2: 64},
            seconds={0: 38, 1: 40, 2: 50, 4: 60, 8: 40, 16: 32, 32: 27, 64: 26},
            targets={8: 3.5, 64: 5.5},
        ),
        _paper(
            "2000x500@20480",
            128,
            (2000, 500),
            20480,
            rates=(8,),
            stock_prompts=64,
            seconds={0: 26, 8: 21},
            targets={8: 2.5},
        ),
        _paper(
            "6000x500@49152",
            64,
            (6000, 500),
            49152,
            rates=(8,),
            stock_prompts=64,
            seconds={0: 41, 8: 18},
            targets={8: 2.5},
        ),
        # Does it pay to compress between chunks a prompt that fits?
        _paper(
            "6000x500@20480+chunks",
            128,
            (6000, 500),
            20480,
            rates=(8, 64),
            systems=(OURS,),
            engine={"kv_compress_chunks": "always"},
            seconds={8: 43, 64: 30},
            targets={8: 3.5, 64: 5.5},
        ),
        _paper(
            "60000@20480",
            1,
            (60000, 32),
            20480,
            rates=(8,),
            seconds={0: 2, 8: 8},
        ),
        # What a decode step between two prefills costs where it helps nobody.
        _paper(
            "6000x1@20480",
            64,
            (6000, 1),
            20480,
            rates=(8,),
            seconds={0: 10, 8: 10},
            targets={8: 0.98},
        ),
        _paper(
            "256x128@20480",
            256,
            (256, 128),
            20480,
            rates=(1,),
            seconds={0: 8, 1: 8},
            targets={1: 0.98},
        ),
        # The paper's second table.
        _paper(
            "70b-6000x500@20480",
            40,
            (6000, 500),
            20480,
            LARGE_GROUP,
            rates=(8, 64, 1, 4),
            stock_prompts=9,
            rate_prompts={1: 9},
            seconds={0: 50, 1: 50, 4: 90, 8: 60, 64: 55},
            targets={1: 0.98, 8: 2.2, 64: 3.0},
        ),
        _paper(
            "70b-2000x500@20480",
            64,
            (2000, 500),
            20480,
            LARGE_GROUP,
            rates=(8, 64, 1, 4),
            stock_prompts=20,
            rate_prompts={1: 20},
            seconds={0: 30, 1: 30, 4: 45, 8: 30, 64: 25},
            targets={1: 0.98},
        ),
        # Stock with a pool as large as ours and what we keep beside it, 8,254 tokens.
        _paper(
            "6000x500@28736",
            128,
            (6000, 500),
            28736,
            rates=(),
            stock_prompts=32,
            systems=(STOCK,),
            seconds={0: 30},
        ),
        # As the first of the small ones, with a cache of half the bytes a token.
        _paper(
            "6000x500@40960+fp8",
            128,
            (6000, 500),
            40960,
            BYTES_GROUP,
            rates=(8, 4, 64, 1),
            stock_prompts=32,
            rate_prompts={1: 32},
            shared=FP8,
            seconds={0: 25, 1: 28, 4: 45, 8: 35, 64: 25},
            targets={1: 0.98, 4: 1.8},
        ),
        _paper(
            "9000x300@24576",
            24,
            (9000, 300),
            24576,
            BYTES_GROUP,
            rates=(8, 4, 1),
            seconds={0: 26, 1: 27, 4: 14, 8: 10},
            targets={1: 0.98},
        ),
        _paper(
            "9000x300@49152+fp8",
            24,
            (9000, 300),
            49152,
            BYTES_GROUP,
            rates=(8, 4, 1),
            shared=FP8,
            seconds={0: 15, 1: 16, 4: 11, 8: 10},
            targets={1: 0.98},
        ),
        # First in its group: it needs an engine that has served nothing yet.
        Load(
            "first-requests",
            10,
            2000,
            64,
            0,
            (8,),
            mode="first",
            seconds={0: 13, 8: 13},
        ),
        Load(
            "6000x256@all",
            128,
            6000,
            256,
            0,
            (1,),
            seconds={0: 28, 1: 28},
            targets={1: 0.98},
        ),
        Load(
            "6000x1500@all",
            64,
            6000,
            1500,
            0,
            (8,),
            seconds={0: 38, 8: 25},
            targets={8: 1.5},
            step_targets={8: 2.0},
        ),
        Load(
            "32000x1500@all",
            16,
            32000,
            1500,
            0,
            (8,),
            seconds={0: 40, 8: 32},
            targets={8: 1.5},
            step_targets={8: 2.0},
        ),
        Load(
            "6000x1@all",
            128,
            6000,
            1,
            0,
            (8, 1),
            seconds={0: 20, 1: 21, 8: 21},
            targets={8: 0.97, 1: 0.97},
        ),
        Load(
            "itl",
            32,
            6000,
            400,
            0,
            (8,),
            mode="itl",
            seconds={0: 10, 8: 10},
        ),
        Load(
            "flag-absent",
            128,
            6000,
            256,
            0,
            (),
            group=FLAG_GROUP,
            systems=(STOCK, ABSENT),
            seconds={0: 28},
            targets={0: 0.98},
        ),
    )
}


def choose(group: str, ids: Iterable[str] = ()) -> list[Load]:
    """Loads of a group (or "every"), or those of `ids`, in the order of `LOADS`.

    Raises
    ------
    SystemExit
        For an unknown id.
    """
    wanted = [part for part in ids if part]
    if unknown := [part for part in wanted if part not in LOADS]:
        raise SystemExit(f"unknown loads {unknown}; there are {', '.join(LOADS)}")
    groups = EVERY if group == "every" else (group,)
    return [
        load
        for load in LOADS.values()
        if (load.id in wanted if wanted else load.group in groups)
    ]
