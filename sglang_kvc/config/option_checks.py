"""What the options of a server must be, one by one and together.

Imports neither torch nor SGLang.
"""

from __future__ import annotations

from typing import Any

from sglang_kvc.config.checks import (
    check_choice,
    check_int,
    check_number,
    check_switch,
)
from sglang_kvc.config.described import flags_of
from sglang_kvc.config.metrics import ATTENTION_METRICS, METRICS
from sglang_kvc.errors import ConfigError

MAX_WINDOW = 256
MAX_POOL = 128
MAX_DELAY = 4096


def check_options(options: Any) -> None:
    """Raise unless a server can be started with these options.

    Parameters
    ----------
    options : a new `KVCompressOptions`.

    Raises
    ------
    ConfigError
        Naming the option, what it must be and what it is.
    """
    keep = options.keep
    check_int("window", options.window, 1, MAX_WINDOW)
    check_int("protected", options.protected, 1)
    check_int("interval", options.interval, 1)
    check_int("answer", options.answer, 0)
    check_int("delay", options.delay, 0, MAX_DELAY)
    check_int("sinks", options.sinks, 0)
    check_int("turns", options.turns, 0)
    check_switch("sessions", options.sessions)
    check_number("sessions_host", options.sessions_host, 0)
    if options.sessions_host and not options.sessions:
        raise ConfigError(
            f"sessions_host={options.sessions_host:g} is host memory for sessions, "
            "which are off. Switch sessions on, or leave it out."
        )
    check_int("pool_back", options.pool_back, 0, MAX_POOL)
    check_int("pool_ahead", options.pool_ahead, 0, MAX_POOL)
    check_number("pool_decay", options.pool_decay, 0, 1, above=True)
    check_number("pool_gain", options.pool_gain, 0, 1, above=True)
    for name, flag in flags_of(type(options)).items():
        if flag.choices:
            check_choice(name, getattr(options, name), flag.choices)
    check_number("distinct", options.distinct_weight, 0)
    check_number("aging", options.aging, 0, 1, above=True)
    for name, asks in (
        ("distinct", options.distinct),
        ("aging", options.aging != 1),
        ("delay", options.delay),
    ):
        if asks and not METRICS[options.metric].observes:
            raise ConfigError(
                f"{name}={getattr(options, name)} changes what attention says; "
                f"metric={options.metric} does not ask it. Leave one of them out, or "
                f"use one of {', '.join(ATTENTION_METRICS)}."
            )
    check_int("head_floor", options.head_floor, 0)
    check_number("layer_share", options.least_layer_share, 0, 1)
    if options.layer_share and options.allocation != "joint":
        raise ConfigError(
            f"layer_share={options.layer_share} bounds what joint budgets take from a "
            f"layer; with allocation={options.allocation} there is nothing to bound. "
            "Leave one of them out."
        )
    options.check_budget("min_budget", options.min_budget)
    if keep.budget is not None:
        options.check_budget("budget", keep.budget)
