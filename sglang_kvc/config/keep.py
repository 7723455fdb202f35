"""How much a request keeps: a rate or a budget. Imports neither torch nor SGLang."""

from __future__ import annotations

import math
from dataclasses import InitVar, dataclass

from sglang_kvc.config.checks import check_int, check_rate
from sglang_kvc.config.pages import ceil_tokens
from sglang_kvc.errors import ConfigError


@dataclass(frozen=True)
class Keep:
    """A rate or a budget, exactly one of them.

    Parameters
    ----------
    rate : float, optional
        ``logical length / tokens kept``, at least 1; 1 keeps everything.
    budget : int, optional
        Tokens kept per KV head on average, whatever the length.
    prefix : str
        What error messages put before both names.

    Raises
    ------
    ConfigError
        If a value is outside its range, or if both or none are given.
    """

    rate: float | None = None
    budget: int | None = None
    prefix: InitVar[str] = ""

    def __post_init__(self, prefix: str) -> None:
        if self.rate is not None:
            check_rate(f"{prefix}rate", self.rate)
        if self.budget is not None:
            check_int(f"{prefix}budget", self.budget, 1)
        if self.rate is None and self.budget is None:
            raise ConfigError(f"{prefix}rate or {prefix}budget must be given.")
        if self.rate is not None and self.budget is not None:
            raise both_given(
                f"{prefix}rate={self.rate}", f"{prefix}budget={self.budget}"
            )

    def tokens(self, length: int, min_budget: int = 1) -> int:
        """Tokens that a request of this length may keep, per KV head on average.

        Parameters
        ----------
        length : int
            Tokens the request has seen (prompt and output).
        min_budget : int
            With a rate: the least that is kept.

        Returns
        -------
        int
            Whole pages. It may exceed `length`: then nothing has to be evicted.
        """
        if self.budget is not None:
            return ceil_tokens(self.budget)
        assert self.rate is not None
        return ceil_tokens(max(min_budget, math.ceil(length / self.rate)))


def both_given(rate: str, budget: str) -> ConfigError:
    """The error of a rate beside a budget, each as its sender wrote it."""
    return ConfigError(f"{rate} and {budget} exclude each other; give one of them.")
