"""How many tokens a request has held while it decoded. No torch, no SGLang."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Residency:
    """Resident tokens of a request, added up over its decode steps.

    Between two passes they grow by one a step, so a pass is the only time to add.

    Attributes
    ----------
    counted : logical length up to which steps are in the sum.
    total : the sum, in tokens per KV head on average.
    """

    counted: int = 0
    total: int = 0

    def add(self, start: int, length: int, resident: int) -> None:
        """Add the steps up to `length`, at which `resident` tokens are held.

        Parameters
        ----------
        start : where the prompt ends: steps before it do not count.
        length, resident : before a pass.
        """
        self.total += self._missing(start, length, resident)
        self.counted = length

    def mean(self, start: int, length: int, resident: int) -> int:
        """Mean over all steps from `start` to `length`; `resident` before the first."""
        steps = length - start
        if steps <= 0:
            return resident
        return round((self.total + self._missing(start, length, resident)) / steps)

    def _missing(self, start: int, length: int, resident: int) -> int:
        """Sum over the steps that are not counted, the last of which holds most."""
        steps = max(length - max(self.counted, start), 0)
        return steps * resident - steps * (steps - 1) // 2
