"""Systems that are compared: engines, and the settings of a request.

A system is written ``stock``, ``ours``, ``ours:allocation=layer,window=64`` or
``kvpress:snapkv``; options of ``ours`` are server flags without ``--kv-compress-``, or
two of SGLang's own: ``tp_size`` and ``kv_cache_dtype``.
A setting is a rate (``4``) or a budget in tokens (``b512``), either with tokens of the
answer that stay whole beside it (``8+512``, ``b512+512``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sglang_kvc.config.keep import Keep
from sglang_kvc.errors import ConfigError

STOCK, OURS, KVPRESS = "stock", "ours", "kvpress"
FULL_PRESS = "full"
KINDS = (STOCK, OURS, KVPRESS)
SHARE = "+"
"""Before the answer's tokens of a setting."""
MIN_BUDGET = 64
"""Low enough for 64x at 4k tokens; more if what no head may lose is more."""
PRESETS = ("ours", "ours:allocation=layer", "ours:allocation=head")
RATES = ("1", "4", "8", "2", "16", "32", "64")
"""In the order of their importance."""
SGLANG_OPTIONS = ("tp_size", "kv_cache_dtype")
"""Keywords of ``sglang.Engine`` that may change answers, so they are in the name."""
ALL_QUERIES = "full"
"""Metrics so named observe every query of a prompt, cached prefixes included."""


@dataclass(frozen=True)
class Setting(Keep):
    """How much a request may keep, and how it is written.

    Attributes
    ----------
    answer : int
        Last tokens of the answer that stay whole beside that.
    """

    answer: int = 0

    @property
    def label(self) -> str:
        """Name of the setting: ``4``, ``b512`` or ``8+512``."""
        share = f"{SHARE}{self.answer}" if self.answer else ""
        return (f"b{self.budget}" if self.budget else f"{self.rate:g}") + share

    @property
    def option(self) -> dict[str, Any]:
        """The ``kv_compress`` entry of a request."""
        share = {"answer": self.answer} if self.answer else {}
        keep = {"budget": self.budget} if self.budget else {"rate": self.rate}
        return keep | share

    @property
    def is_full(self) -> bool:
        """Whether nothing is to be evicted."""
        return self.rate == 1

    def kept(self, tokens: int) -> int:
        """Tokens kept of a prompt, per head on average."""
        if self.budget:
            return min(tokens, self.budget)
        assert self.rate
        return max(1, round(tokens / self.rate))


FULL = Setting(rate=1)


def parse_setting(word: str) -> Setting:
    """The setting of a label.

    Raises
    ------
    ValueError
        If it is neither a rate of at least 1 nor ``b`` and a number of tokens.
    """
    try:
        keep, plus, share = word.partition(SHARE)
        answer = int(share) if plus else 0
        if answer < 0:
            raise ValueError
        if keep.startswith("b"):
            return Setting(budget=int(keep[1:]), answer=answer)
        return Setting(rate=float(keep.removesuffix("x")), answer=answer)
    except ConfigError as error:
        raise ValueError(f"{word!r}: {error}") from None
    except ValueError:
        raise ValueError(
            f"{word!r} is no setting: a rate such as 4, a budget such as b512, or with "
            "an answer of its own such as 8+512"
        ) from None


@dataclass(frozen=True)
class System:
    """One engine.

    Attributes
    ----------
    kind : str
        One of `KINDS`.
    options : tuple of (str, value)
        Sorted; of ``ours`` without the prefix ``kv_compress_``.
    press : str
        Name of the method of ``kvpress``.
    """

    kind: str
    options: tuple[tuple[str, Any], ...] = ()
    press: str = ""

    @property
    def name(self) -> str:
        """Name of the system, as `parse_system` reads it."""
        if self.press:
            return f"{self.kind}:{self.press}"
        words = ",".join(f"{key}={value}" for key, value in self.options)
        return f"{self.kind}:{words}" if words else self.kind

    @property
    def engine(self) -> str:
        """Name of the engine that serves it: one prefill serves all of kvpress."""
        return self.kind if self.kind == KVPRESS else self.name

    @property
    def never_evicts(self) -> bool:
        """Whether it can be asked with the full cache only."""
        return self.kind == STOCK or self.press == FULL_PRESS

    @property
    def reuses_prefixes(self) -> bool:
        """Whether a cached prefix changes nothing of what it keeps."""
        return not str(dict(self.options).get("metric", "")).endswith(ALL_QUERIES)

    def keywords(self) -> dict[str, Any]:
        """Keywords of ``sglang.Engine`` that belong to the system."""
        if self.kind == STOCK:
            return {}
        from sglang_kvc.config.options import KVCompressOptions

        given = dict(self.options)
        known = {k: v for k, v in given.items() if hasattr(KVCompressOptions, k)}
        least = max(MIN_BUDGET, KVCompressOptions(**known).floor)
        options = {"min_budget": least} | given
        return {
            "kv_compress": True,
            **{_keyword(key): value for key, value in options.items()},
        }


def _keyword(option: str) -> str:
    return option if option in SGLANG_OPTIONS else f"kv_compress_{option}"


def _value(word: str) -> Any:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(word, word)


def parse_system(word: str) -> System:
    """The system of a name.

    Raises
    ------
    ValueError
        With the forms that there are.
    """
    kind, _, rest = word.partition(":")
    if kind not in KINDS or (kind == STOCK and rest) or (kind == KVPRESS and not rest):
        raise ValueError(
            f"unknown system {word!r}: stock, ours, ours:OPTION=VALUE,... or "
            "kvpress:METHOD"
        )
    if kind == KVPRESS:
        return System(kind, press=rest)
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"{word!r}: {part!r} is no OPTION=VALUE")
        options[key.strip().replace("-", "_")] = _value(value.strip())
    return System(kind, tuple(sorted(options.items())))


def parse_systems(words: Iterable[str]) -> list[System]:
    """Systems of several names, each once."""
    return list(dict.fromkeys(parse_system(word) for word in words))
