"""Which servers are compared, and how each is started.

A system's name says all of it:

===============  ======================================================================
``stock``        SGLang as it comes
``stock-fp8``    with an e4m3 cache, so twice the tokens in the same bytes
``stock-host``   with a hierarchical cache in host memory
``ours-4``       KV-Compress at rate 4
``sessions-4``   the same with ``--kv-compress-sessions``
``...-4-fp8``    either with an e4m3 cache
``...-4-host``   sessions with as much host memory as the hierarchical cache has
===============  ======================================================================
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

STOCK, OURS, SESSIONS = "stock", "ours", "sessions"
FP8, HOST = "fp8", "host"
FP8_TOKENS = 2
"""Tokens of an e4m3 cache in the bytes of one of bf16."""


@dataclass(frozen=True)
class System:
    """One server.

    Parameters
    ----------
    name : str
    kind : {"stock", "ours", "sessions"}
    rate : float
        1 for stock.
    fp8, host : bool
    """

    name: str
    kind: str
    rate: float = 1
    fp8: bool = False
    host: bool = False

    @property
    def stock(self) -> bool:
        """Whether it runs without our plugin."""
        return self.kind == STOCK

    def pool(self, tokens: int) -> int:
        """Tokens of its pool in the bytes of `tokens` of bf16."""
        return tokens * (FP8_TOKENS if self.fp8 else 1)

    def flags(self, ratio: float, min_budget: int | None = None) -> list[str]:
        """Its own flags.

        Parameters
        ----------
        ratio : float
            Host memory, as a multiple of the pool.
        min_budget : int, optional
            Tokens that are kept in any case, with our plugin.
        """
        flags = ["--kv-cache-dtype", "fp8_e4m3"] if self.fp8 else []
        if self.host and self.stock:
            flags += ["--enable-hierarchical-cache", "--hicache-ratio", f"{ratio:g}"]
        if not self.stock:
            flags += ["--kv-compress-rate", f"{self.rate:g}"]
            if min_budget:
                flags += ["--kv-compress-min-budget", str(min_budget)]
        if self.kind == SESSIONS:
            flags += ["--kv-compress-sessions"]
            if self.host:
                flags += ["--kv-compress-sessions-host", f"{ratio:g}"]
        return flags


def parse_system(name: str) -> System:
    """The system of a name.

    Raises
    ------
    argparse.ArgumentTypeError
        If it names none.
    """
    kind, *parts = name.split("-")
    fp8, host = FP8 in parts, HOST in parts
    rest = [part for part in parts if part not in (FP8, HOST)]
    bad = f"no system {name!r}: stock, stock-fp8, stock-host, ours-4, sessions-8 ..."
    if kind == STOCK:
        if rest or (fp8 and host):
            raise argparse.ArgumentTypeError(bad)
        return System(name, kind, fp8=fp8, host=host)
    try:
        (rate,) = map(float, rest)
    except ValueError:
        raise argparse.ArgumentTypeError(bad) from None
    known = kind == SESSIONS or (kind == OURS and not host)
    if not known or rate < 1:
        raise argparse.ArgumentTypeError(bad)
    return System(name, kind, rate, fp8, host)


def parse_systems(names: str) -> list[System]:
    """Systems of a list with commas."""
    return [parse_system(name.strip()) for name in names.split(",") if name.strip()]
