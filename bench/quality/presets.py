"""Runs by name: what a study needs, in the place of ``--systems`` and the like.

The ``tune`` presets change one option at a time around the defaults of the server, on
an odd seed: no text of theirs occurs in the runs that are reported, whose seed is even.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bench.quality.systems import OURS, PRESETS, RATES
from bench.quality.tasks import RULER
from sglang_kvc.config.options import KVCompressOptions

TUNING_SEED, REPORTED_SEED = 1, 0
TUNE = "tune"
FACTORS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "windows": ("window", (16, 32, 64, 128, 256)),
    "pool-back": ("pool_back", (0, 3, 16, 32, 64, 96)),
    "pool-ahead": ("pool_ahead", (0, 3, 16, 32)),
    "pool-decay": ("pool_decay", (0.8, 0.9, 0.95, 1.0)),
    "pool-gain": ("pool_gain", (0.01, 0.03, 0.1, 0.3, 1.0)),
    "protected": ("protected", (32, 64, 128)),
    "interval": ("interval", (32, 64, 128)),
    "aging": ("aging", (0.5, 0.8, 1.0)),
    "sinks": ("sinks", (0, 4, 16)),
    "metric": ("metric", ("l2", "l1", "value_norm", "value_norm_l1")),
    "floor": ("head_floor", (0, 64, 128)),
    "distinct": ("distinct", (0.0, 0.1, 0.3, 1.0)),
    "layer-share": ("layer_share", (0.0, 0.5, 0.75)),
    "allocation": ("allocation", ("joint", "layer", "head")),
    "delay": ("delay", (0, 16, 32, 64)),
}
"""Name of a preset: the option that it varies, and its values."""
RESOLVED = {"distinct": "distinct_weight", "layer_share": "least_layer_share"}
"""Where the options say what an option that is not given comes to."""
REPORTS = ("squality", "qmsum", "code_purpose", "fact_report", "wiki_report", "lists")
"""Long answers about long texts, and lists, most important first."""
REPLAYS = ("long-replay", "essay_report")
"""What the full cache said of them."""
CHAINS = ("gsm8k_four", "math_long", "gsm8k_steps", "math500")
"""Long answers to short prompts."""
SHARED = ("1", "8", "8+512", "4", "4+512", "16", "16+512", "2", "2+512", "6", "3", "12")
"""Rates with and without a share of the answer's own; the last ones stand where the
former hold as many tokens on average."""
BUDGETS = (
    *("1", "2", "2+512", "b512", "b256+256", "b1024", "b512+512", "2+2048"),
    *("1.5", "b768"),
)
TABLE = (
    RULER,
    "kv",
    "fewshot",
    "needles",
    "summary",
    "lm",
    "reuse",
    "replay",
    "reasoning",
)
"""All tasks but long answers and conversations, most important first."""
LONG_METHODS = ("full", "rkv", "tova", "keydiff", "adakv", "expected")
KVPRESS_METHODS = (
    "full",
    "snapkv",
    "snapkv32",
    "adakv",
    "expected",
    "adakv-expected",
    "keydiff",
    "tova",
    "pyramidkv",
    "streaming",
    "random",
)

SESSIONS = (
    f"{OURS}:sessions=true",
    OURS,
    f"{OURS}:metric=key_similarity,sessions=true",
)
"""What a turn leaves; every turn computed again; KeyDiff's score in the first's place.

The whole history is the first one's rate 1.
"""
KEYS_COUNT = (0.3, 1.0, 3.0)
"""Weights of distinct keys: KeyDiff finds the facts of a list that attention loses."""


@dataclass(frozen=True)
class Preset:
    """Values that take the place of the defaults of ``run``; flags still win."""

    systems: tuple[str, ...]
    tasks: tuple[str, ...]
    rates: tuple[str, ...]
    samples: int
    seed: int
    lengths: tuple[int, ...] = (4096,)

    def arguments(self) -> dict[str, Any]:
        """Values by the names that argparse gives them."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


def shipped(option: str) -> Any:
    """Default of a server's option."""
    return getattr(KVCompressOptions(), RESOLVED.get(option, option))


def variants(option: str, values: tuple[Any, ...]) -> list[str]:
    """Systems for the values of an option that are not the server's default."""
    default = shipped(option)
    return [f"{OURS}:{option}={value}" for value in values if value != default]


def _tuning(systems: list[str]) -> Preset:
    # The QA tasks count among the RULER-like ones; so that they stay if that changes.
    return Preset(
        (OURS, *systems),
        tasks=(RULER, "qa"),
        rates=("1", "4", "8"),
        samples=20,
        seed=TUNING_SEED,
    )


def _long(tasks: tuple[str, ...], rates: tuple[str, ...], seed: int) -> Preset:
    return Preset((OURS,), tasks, rates, 50, seed, (6144,))


def _long_presets() -> dict[str, Preset]:
    """Long answers: reported on one seed, chosen on the other with other shares."""
    found = {
        "long": _long(REPORTS, SHARED, REPORTED_SEED),
        "long-replay": _long(REPLAYS, SHARED, REPORTED_SEED),
        "chain": _long(CHAINS, BUDGETS, REPORTED_SEED),
        "long-kvpress": Preset(
            tuple(f"kvpress:{name}" for name in LONG_METHODS),
            (*REPORTS, *CHAINS),
            ("1", "4", "8", "2"),
            50,
            REPORTED_SEED,
            (6144,),
        ),
        f"{TUNE}-long": _long(
            (*REPORTS, *REPLAYS),
            ("1", "8", "8+512", "8+256", "8+128", "4", "4+512", "4+256", "6"),
            TUNING_SEED,
        ),
        f"{TUNE}-chain": _long(
            CHAINS,
            (
                *("1", "2", "2+512", "2+1024", "2+128", "b512", "b256+256"),
                *("b128+384", "b1024", "b512+512", "1.5"),
            ),
            TUNING_SEED,
        ),
    }
    late = ("delay=16", "delay=32", "delay=32,window=64")
    found[f"{TUNE}-delay-long"] = Preset(
        (OURS, *(f"{OURS}:{one}" for one in late)),
        (*REPORTS, *REPLAYS),
        ("1", "8", "4"),
        30,
        TUNING_SEED,
        (6144,),
    )
    others = ("interval=32", "window=64", "aging=0.5", "protected=128", "aging=0.8")
    found[f"{TUNE}-long-passes"] = Preset(
        (OURS, *(f"{OURS}:{one}" for one in others)),
        ("squality", "qmsum", "fact_report", "gsm8k_four"),
        ("1", "8", "2", "8+512"),
        50,
        TUNING_SEED,
        (6144,),
    )
    return found


def _presets() -> dict[str, Preset]:
    methods = tuple(f"kvpress:{name}" for name in KVPRESS_METHODS)
    found = {
        "table": Preset(PRESETS, TABLE, RATES, 50, REPORTED_SEED),
        "table-kvpress": Preset(
            methods, TABLE, ("1", "4", "8", "2"), 50, REPORTED_SEED
        ),
    }
    everything = []
    for name, (option, values) in FACTORS.items():
        systems = variants(option, values)
        everything += systems
        found[f"{TUNE}-{name}"] = _tuning(systems)
    found["sessions"] = Preset(
        SESSIONS, ("sessions",), ("1", "4", "8", "2"), 50, REPORTED_SEED
    )
    found[f"{TUNE}-sessions"] = Preset(
        (SESSIONS[0], *(f"{SESSIONS[0]},distinct={x}" for x in KEYS_COUNT)),
        *(("sessions",), ("1", "4", "8", "2"), 30, TUNING_SEED),
    )
    found["sessions-kvpress"] = Preset(
        tuple(f"kvpress:{name}" for name in ("full", "keydiff", "repetition")),
        *(("sessions",), ("1", "4", "8", "2"), 50, REPORTED_SEED),
    )
    return found | {TUNE: _tuning(everything)} | _long_presets()


RUNS = _presets()
