"""Plan which engines serve which loads, in which order, before which deadline.

And what an answer must look like to count.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from typing import Any

from bench.serving.loads import (
    ABSENT,
    BYTES_GROUP,
    LARGE_GROUP,
    OURS,
    SMALL_GROUP,
    STOCK,
    Load,
)

END_SECONDS = 12.0
"""What checking and stopping the engines takes."""
ENGINE_MIB = 26 * 1024
"""More than an engine of an 8B model with a small pool takes; 24 GiB were seen."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """One engine: what tells it from the others."""

    system: str
    pool: int
    min_budget: int = 0
    extra: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Short name, for the log."""
        words = [f"{key.removeprefix('kv_compress_')}={v}" for key, v in self.extra]
        return "+".join([f"{self.system}@{self.pool or 'all'}", *words])


@dataclasses.dataclass(frozen=True)
class Run:
    """One load on one engine."""

    load: Load
    spec: Spec
    rate: float
    repeat: int

    @property
    def key(self) -> tuple[str, str, float]:
        """Key of what is the same in every repeat."""
        return self.load.id, self.spec.system, self.rate


def spec_of(load: Load, system: str) -> Spec:
    """The engine that serves this load."""
    shared = tuple(load.shared.items())
    if system != OURS:
        return Spec(system, load.pool, extra=shared)
    extra = (*shared, *load.engine.items())
    return Spec(system, load.pool, load.min_budget, extra)


def engine_arguments(args: argparse.Namespace, spec: Spec) -> dict[str, Any]:
    """Keywords of sglang.Engine; systems differ in the plugin's own only."""
    extra = json.loads(args.extra_args)
    kwargs: dict[str, Any] = {
        "model_path": args.model,
        "load_format": args.load_format,
        "skip_tokenizer_init": True,
        "skip_server_warmup": True,
        "log_level": "info",
        "decode_log_interval": 10,
        "random_seed": 0,
    }
    if args.device:
        kwargs["device"] = args.device
    if args.device == "cpu":
        kwargs |= {"dtype": "float32", "disable_cuda_graph": True}
        if spec.system != OURS:
            kwargs["attention_backend"] = "torch_native"
    if spec.pool:
        kwargs["max_total_tokens"] = spec.pool
    if spec.system != OURS:
        # More than any load sends. Ours chooses its number itself: slots cost memory.
        kwargs["max_running_requests"] = 256
    kwargs |= dict(spec.extra)
    if spec.system == OURS:
        kwargs |= {"kv_compress": True, "kv_compress_min_budget": spec.min_budget}
    else:
        extra = {k: v for k, v in extra.items() if not k.startswith("kv_compress")}
    return {**kwargs, **extra}


def engines_together(total_mib: int | None) -> int:
    """Engines with small pools that a GPU of this memory holds; 0: no limit."""
    return 0 if total_mib is None else max(1, total_mib // ENGINE_MIB)


def plan(
    loads: list[Load], repeats: int, together: int = 0, large: bool = False
) -> list[list[Run]]:
    """Batches of runs; the engines of a batch are alive at the same time.

    At most `together` of them, unless that is 0; those of a 70B model are alone unless
    `large`. In a repeat every load runs first with each system and its most important
    rate, then with the other rates: a deadline cuts off what matters least.
    """
    runs = []
    for repeat in range(repeats):
        for level in range(max((len(load.rates) for load in loads), default=0) or 1):
            for load in loads:
                if load.mode == "first" and repeat:
                    continue  # needs an engine that has served nothing yet
                if level == 0:
                    for system in load.systems:
                        if system != OURS:
                            runs.append(Run(load, spec_of(load, system), 0, repeat))
                if OURS in load.systems and level < len(load.rates):
                    rate = load.rates[level]
                    runs.append(Run(load, spec_of(load, OURS), rate, repeat))
    pools = (SMALL_GROUP, BYTES_GROUP, *([LARGE_GROUP] if large else ()))
    small = [run for run in runs if run.load.group in pools]
    alone = [run for run in runs if run.load.group not in pools]
    engines = list(dict.fromkeys(run.spec for run in small))
    step = together or max(len(engines), 1)
    groups = [engines[i : i + step] for i in range(0, len(engines), step)]
    groups += [
        [spec]
        for spec in sorted(
            dict.fromkeys(run.spec for run in alone),
            key=lambda spec: (STOCK, ABSENT, OURS).index(spec.system),
        )
    ]
    # A spec of either kind has a pool of its own size, so it is in one group only.
    return [[run for run in runs if run.spec in group] for group in groups]


class Clock:
    """Time since the start, and what fits before the deadline."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self._start = time.monotonic()
        self._learnt: dict[tuple[str, str, float], float] = {}

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def left(self) -> float:
        """Seconds to the deadline, less what checking and stopping engines takes."""
        return (self.deadline or 1e9) - END_SECONDS - self.elapsed()

    def expected(self, run: Run) -> float:
        """Seconds of a run: as in the last repeat, else the load's estimate."""
        rate = run.rate if run.spec.system == OURS else 0
        return self._learnt.get(run.key, run.load.expected(rate))

    def learn(self, run: Run, seconds: float) -> None:
        """Remember what a run took."""
        self._learnt[run.key] = seconds

    def fits(self, run: Run) -> bool:
        """Whether a run can end in time."""
        return self.expected(run) <= self.left()


def with_rates(load: Load, chosen: str) -> Load:
    """The load at the chosen rates ("8,64"), or as it is if it has none of them."""
    wanted = [float(rate) for rate in chosen.split(",")]
    rates = tuple(rate for rate in load.rates if rate in wanted)
    return dataclasses.replace(load, rates=rates or load.rates)


def with_systems(load: Load, chosen: str) -> Load:
    """The load with the chosen of its systems ("stock,kvc")."""
    systems = tuple(system for system in load.systems if system in chosen.split(","))
    return dataclasses.replace(load, systems=systems)


def chosen(loads: list[Load], rates: str, systems: str) -> list[Load]:
    """The loads at the chosen rates and with the chosen systems; "" is all of them.

    Raises
    ------
    SystemExit
        For a rate or a system that none of the loads has.
    """
    for what, asked, known in (
        ("rates", rates, {f"{rate:g}" for load in loads for rate in load.rates}),
        ("systems", systems, {name for load in loads for name in load.systems}),
    ):
        names = [f"{float(one):g}" if what == "rates" else one for one in _words(asked)]
        if unknown := [name for name in names if name not in known]:
            raise SystemExit(
                f"no load has the {what} {', '.join(unknown)}; there are "
                f"{', '.join(sorted(known))}"
            )
    if rates:
        loads = [with_rates(load, rates) for load in loads]
    return [with_systems(load, systems) for load in loads] if systems else loads


def _words(text: str) -> list[str]:
    return text.split(",") if text else []


def without_stock(load: Load) -> Load:
    """Leave stock out, for the CPU: SGLang's PyPI build needs our plugin there."""
    systems = (ABSENT if system == STOCK else system for system in load.systems)
    return dataclasses.replace(load, systems=tuple(dict.fromkeys(systems)))


def supported(load: Load) -> Load | None:
    """The load as this build can serve it: None if a keyword of ours does not exist.

    A keyword whose default is what the load asks for needs no engine of its own.
    """
    from sglang_kvc.config.options import KVCompressOptions

    defaults = {
        f"kv_compress_{one.name}": one.default
        for one in dataclasses.fields(KVCompressOptions)
    }
    if missing := [key for key in load.engine if key not in defaults]:
        print(f"{load.id} left out: this build has no {', '.join(missing)}")
        return None
    needed = {k: v for k, v in load.engine.items() if defaults[k] != v}
    return dataclasses.replace(load, engine=needed)


def adhoc(args: argparse.Namespace) -> Load:
    """One load of the command line's numbers; its engines run one by one."""
    lengths = f"{args.min_len}-{args.max_len}x{args.output}"
    return Load(
        id=f"{args.requests}x{lengths}@{args.pool or 'all'}",
        prompts=args.requests,
        input_len=args.max_len,
        min_input_len=args.min_len,
        output_len=args.output,
        pool=args.pool,
        rates=(args.rate,),
        systems=tuple(args.systems.split(",")) if args.systems else (STOCK, OURS),
        min_budget=args.min_budget,
        seed=args.seed,
    )


def check(run: Run, answer: dict[str, Any], plugin_loaded: bool) -> str:
    """Find what is wrong with an answer of the child; empty if nothing is."""
    load, system = run.load, run.spec.system
    count = load.count(system, run.rate)
    wrong = []
    if plugin_loaded != (system != STOCK):
        wrong.append(f"plugin loaded: {plugin_loaded}")
    if "failed" in answer:
        return "; ".join([*wrong, answer["failed"]])
    if answer["lengths"] != [load.output_len] * count:
        wrong.append("an output has another length")
    if answer["compressed"] != (count if system == OURS else 0):
        wrong.append(f"{answer['compressed']} outputs carry kv_compress")
    must_pass = run.rate > 1 and load.input_len > 2 * load.min_budget
    if system == OURS and must_pass and load.output_len >= 32 and not answer["passes"]:
        wrong.append("nothing was compressed")
    return "; ".join(wrong)
