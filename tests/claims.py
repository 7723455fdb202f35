"""Two pytest runs share the tests of one selection: a plugin of `lanes`.

Both collect all of them. The first goes through the files in order and the second
backwards, and each runs what it is the first to claim, so they end together.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

CLAIMS, BACKWARDS = "KVC_TEST_CLAIMS", "KVC_TEST_BACKWARDS"
"""Environment variables: a folder that both know; 1 for the second run."""
SERVER = "server"
"""A fixture. It takes a minute to start, so all its tests are one unit."""


def unit_of(item: pytest.Item) -> str:
    """What is claimed as a whole: a file, or everything that asks the server."""
    served = SERVER in getattr(item, "fixturenames", ())
    return SERVER if served else item.nodeid.partition("::")[0]


class Claims:
    """The units that this run has claimed, and those that it has not got.

    Parameters
    ----------
    folder : has a file for every claim.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mine: dict[str, bool] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """True, so that pytest does nothing, if the other run has this test."""
        unit = unit_of(item)
        if unit not in self.mine:
            self.mine[unit] = self._claim(unit)
        return None if self.mine[unit] else True

    def _claim(self, unit: str) -> bool:
        try:
            (self.folder / unit.replace("/", ":")).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole units, one after the other; the second run begins with the last one."""
    units: dict[str, list[pytest.Item]] = {}
    for item in items:
        units.setdefault(unit_of(item), []).append(item)
    # The server's first in the second run, last in the first: an idle one is not free.
    order = [name for name in units if name != SERVER]
    order += [SERVER] if SERVER in units else []
    if os.environ.get(BACKWARDS) == "1":
        order.reverse()
    items[:] = [item for name in order for item in units[name]]


def pytest_configure(config: pytest.Config) -> None:
    """Nothing is shared where `lanes` has not said so."""
    if folder := os.environ.get(CLAIMS):
        config.pluginmanager.register(Claims(Path(folder)))
