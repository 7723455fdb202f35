"""Flags and keyword arguments of KV-Compress, parsed into `KVCompressOptions`.

Like `options`, this module imports neither torch nor SGLang.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import MutableMapping
from typing import Any

from sglang_kvc.config.described import flags_of, help_of
from sglang_kvc.config.keep import both_given
from sglang_kvc.config.options import SWITCH, KVCompressOptions
from sglang_kvc.errors import ConfigError

_FLAGS = flags_of(KVCompressOptions)
USER_FLAGS = tuple(name for name, flag in _FLAGS.items() if not flag.expert)
"""What a user turns, beside the switch; the others are for experts."""


def add_cli_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the ``--kv-compress*`` flags to SGLang's parser.

    Values default to None so that "not given" and "given as the default" differ.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        Modified in place.
    """
    group = parser.add_argument_group(
        "KV-Compress", "Evict the KV cache at its own rate per layer and KV head."
    )
    group.add_argument(
        "--kv-compress",
        action="store_true",
        default=False,
        help="Compress the KV cache of every request.",
    )
    experts = parser.add_argument_group(
        "KV-Compress, expert", "The defaults were tuned together."
    )
    for name, flag in _FLAGS.items():
        target = experts if flag.expert else group
        option = f"--kv-compress-{name.replace('_', '-')}"
        if flag.is_switch:
            text = help_of(KVCompressOptions, name)
            target.add_argument(option, action="store_true", default=None, help=text)
            continue
        target.add_argument(
            option,
            type=flag.parse,
            metavar=flag.placeholder,
            choices=flag.choices or None,
            help=help_of(KVCompressOptions, name),
        )


def options_from_mapping(values: MutableMapping[str, Any]) -> KVCompressOptions | None:
    """Take the ``kv_compress*`` entries out of a mapping.

    Parameters
    ----------
    values : MutableMapping
        Keyword arguments of ``Engine`` or ``vars(Namespace)``; our entries are
        removed. An entry of None counts as not given.

    Returns
    -------
    KVCompressOptions or None
        None if the feature is off.

    Raises
    ------
    ConfigError
        For an unknown ``kv_compress*`` key, a setting without the switch, a rate
        together with a budget, or a value outside its range.
    """
    given = {key: values.pop(key) for key in list(values) if key.startswith(SWITCH)}
    keys = {f"{SWITCH}_{field}": field for field in _FLAGS}
    for key in given:
        if key != SWITCH and key not in keys:
            raise ConfigError(_unknown_key(key, [SWITCH, *keys]))
    switch = given.pop(SWITCH, None)
    fields = {keys[key]: value for key, value in given.items() if value is not None}
    if switch not in (None, True, False):
        raise ConfigError(
            f"{SWITCH} must be True or False, got {switch!r}. Settings have their own "
            f"keywords, for example {SWITCH}_rate=8."
        )
    if not switch:
        if fields:
            names = ", ".join(f"{SWITCH}_{name}" for name in fields)
            raise ConfigError(
                f"{names} given, but KV-Compress is off. Add --kv-compress "
                f"({SWITCH}=True in Python), or drop the setting."
            )
        return None
    if "rate" in fields and "budget" in fields:
        # As the command line has them: the options know no flags.
        raise both_given(
            f"--kv-compress-rate {fields['rate']}",
            f"--kv-compress-budget {fields['budget']}",
        )
    return KVCompressOptions(**fields)


def _unknown_key(key: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(key, valid, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"Unknown keyword {key}.{hint} Valid: {', '.join(valid)}."
