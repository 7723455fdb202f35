"""Install the patches of the catalogue, and tell whether all of them are active."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator

from sglang_kvc.patches import catalogue
from sglang_kvc.upstream.compat import sglang_version
from sglang_kvc.upstream.installer import Installer
from sglang_kvc.upstream.patch import LoadedPatch

INSTALLER = Installer()
SCHEDULER_MODULE = "sglang.srt.managers.scheduler"


def load_patches(
    names: Iterable[str], version: str | None = None
) -> tuple[LoadedPatch, ...]:
    """Import patch files, and leave out those that SGLang does not need.

    Parameters
    ----------
    names : iterable of str
        Files without ``.py``.
    version : str, optional
        Version of SGLang; the installed one if not given.
    """
    version = sglang_version() if version is None else version
    files = [(n, importlib.import_module(f"sglang_kvc.patches.{n}")) for n in names]
    loaded = (LoadedPatch(name, file.PATCH, file.hook) for name, file in files)
    return tuple(each for each in loaded if each.patch.applies_to(version))


def install_hooks() -> None:
    """Install the catalogue of patches; safe to call again."""
    INSTALLER.install(load_patches(catalogue.PARENT))
    INSTALLER.when_imported(
        SCHEDULER_MODULE, lambda: INSTALLER.install(load_patches(catalogue.SCHEDULER))
    )


def verify_hooks_installed() -> None:
    """Raise unless every patch that this process needs is active.

    To be called where an exception stops the server: in the parent before processes
    are started, and in the scheduler process when the attention backend is built.

    Raises
    ------
    SeamDriftError
        Naming what is missing and what to do.
    """
    INSTALLER.verify(_needed())


def _needed() -> Iterator[str]:
    """Names of the patches for this process; asked for behind earlier failures."""
    scheduler = catalogue.SCHEDULER if SCHEDULER_MODULE in sys.modules else ()
    for loaded in load_patches((*catalogue.PARENT, *scheduler)):
        yield loaded.name
