"""Run callbacks directly after the import of a module, without importing it."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class ImportWatcher(importlib.abc.MetaPathFinder):
    """Runs callbacks right after modules have been imported."""

    def __init__(self) -> None:
        self._callbacks: dict[str, list[Callable[[], None]]] = {}

    def when_imported(self, module: str, callback: Callable[[], None]) -> None:
        """Run `callback` now if `module` is loaded, else right after its import."""
        if module in sys.modules:
            callback()
            return
        self._callbacks.setdefault(module, []).append(callback)
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def waits_for(self, module: str) -> bool:
        """Whether the import of `module` would still be noticed."""
        return module in self._callbacks and self in sys.meta_path

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Let the other finders find the module, then tag its loader."""
        if fullname not in self._callbacks:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                for callback in self._callbacks.pop(fullname, []):
                    callback()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
