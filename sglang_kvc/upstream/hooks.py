"""Install our hooks in SGLang, each no earlier than its module is imported.

SGLang imports the module of a target when hooks are applied. That would load the
scheduler into ``launch_server --help``, ten seconds for nothing. So a hook is
registered at once only if its module is loaded; otherwise a watcher on
``sys.meta_path`` does it directly after the import. The order of "plugin loaded",
"Engine imported" and "Scheduler imported" thus does not matter, and no process pays
for modules it does not use.

A failure while installing never disturbs a server that does not use KV-Compress: it is
logged and kept, and :func:`verify_hooks_installed` raises it in the server that does.

``python -m sglang_kvc.upstream.hooks --write-readme`` writes ``patches/README.md``.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.abc
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from sglang_kvc.errors import SeamDriftError
from sglang_kvc.patches import catalogue, readme
from sglang_kvc.upstream.compat import check_seam, resolve

logger = logging.getLogger(__name__)


class HookType(Enum):
    """How a hook meets its target; all but the last are SGLang's own."""

    BEFORE = "before"
    """``hook(*args, **kwargs)`` returns None or new ``(args, kwargs)``."""
    AFTER = "after"
    """``hook(result, *args, **kwargs)`` returns None or a new result."""
    AROUND = "around"
    """``hook(original, *args, **kwargs)`` returns the result."""
    ATTRIBUTE = "attribute"
    """``hook(previous)`` returns the new value of a module or class attribute."""


@dataclass(frozen=True)
class Patch:
    """What is changed in SGLang, why, and until when.

    Parameters
    ----------
    target : str
        ``module:qualified.name``.
    hook_type : HookType
        How the hook meets its target.
    expected_params : tuple of str, optional
        Parameter names of the target in order, with ``self`` or ``cls``, without
        stars; None for an attribute.
    reason : str
        Symptom without the patch.
    upstream_link : str
        Source of the target at the supported version.
    remove_when : str
        Observable condition under which the patch can go.
    """

    target: str
    hook_type: HookType
    expected_params: tuple[str, ...] | None
    reason: str
    upstream_link: str
    remove_when: str

    @property
    def module(self) -> str:
        """Module that defines the target."""
        return self.target.partition(":")[0]

    @property
    def dotted(self) -> str:
        """The target as SGLang's ``HookRegistry`` spells it."""
        return self.target.replace(":", ".")


@dataclass(frozen=True)
class LoadedPatch:
    """A patch file: its name, its record and its hook."""

    name: str
    patch: Patch
    hook: Callable[..., Any]


def load_patches(names: Iterable[str]) -> tuple[LoadedPatch, ...]:
    """Import patch files, given by name without ``.py``."""
    files = [(n, importlib.import_module(f"sglang_kvc.patches.{n}")) for n in names]
    return tuple(LoadedPatch(name, file.PATCH, file.hook) for name, file in files)


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


class Installer:
    """Registers patches once each and knows whether they are active."""

    def __init__(self) -> None:
        self._watcher = ImportWatcher()
        self._patches: dict[str, LoadedPatch] = {}
        self._values: dict[str, Any] = {}
        self._failures: list[Exception] = []

    def install(self, patches: Iterable[LoadedPatch]) -> None:
        """Install each patch now, or when its module is imported.

        Calling it again with the same patches changes nothing.
        """
        for loaded in patches:
            if loaded.name not in self._patches:
                self._patches[loaded.name] = loaded
                register = functools.partial(self._register, loaded)
                self.when_imported(loaded.patch.module, register)

    def when_imported(self, module: str, callback: Callable[[], None]) -> None:
        """Run `callback` once `module` is loaded; a failure is kept, not raised."""

        def guarded() -> None:
            try:
                callback()
            except Exception as error:
                self._failures.append(error)
                logger.exception("sglang_kvc cannot be used in this process")

        self._watcher.when_imported(module, guarded)

    def verify(self, names: Iterable[str]) -> None:
        """Raise unless every patch is active, or will be on import of its module.

        Parameters
        ----------
        names : iterable of str
            Names of the patches that must have been installed.

        Raises
        ------
        SeamDriftError
            Naming what failed while installing, or every target that does not
            carry our hook.
        """
        if self._failures:
            raise SeamDriftError(
                "KV-Compress is on, but could not be installed in this process: "
                f"{'; '.join(map(str, self._failures))}"
            ) from self._failures[0]
        absent = [name for name in names if name not in self._patches]
        if absent:
            raise SeamDriftError(
                "KV-Compress is on, but its plugin was not loaded in this process: "
                f"{', '.join(absent)} not installed. Call "
                "sglang.srt.plugins.load_plugins() first, and check that "
                "SGLANG_PLUGINS, if set, lists kvcompress."
            )
        patches = self._patches.values()
        inactive = [p.patch.target for p in patches if not self._is_active(p)]
        if inactive:
            raise SeamDriftError(
                "KV-Compress is on, but SGLang does not carry its hooks on "
                f"{', '.join(inactive)}. Look for 'Failed to apply hooks' in the log; "
                "another plugin may stand in the way: try SGLANG_PLUGINS=kvcompress."
            )

    def _register(self, loaded: LoadedPatch) -> None:
        patch = loaded.patch
        check_seam(patch.target, patch.expected_params, f"patches/{loaded.name}.py")
        if patch.hook_type is HookType.ATTRIBUTE:
            owner, name, _ = resolve(patch.target)
            self._values[loaded.name] = value = loaded.hook(getattr(owner, name))
            setattr(owner, name, value)
            return
        sglang = importlib.import_module("sglang.srt.plugins.hook_registry")
        sglang.HookRegistry.register(
            patch.dotted,
            loaded.hook,
            sglang.HookType(patch.hook_type.value),
            source=sglang.HookSource("kvcompress", "sglang_kvc"),
        )
        # SGLang applies hooks at the end of load_plugins(), once per target, so that
        # all plugins can register first. What is too late for that, we apply: not by
        # apply_hooks(), which may be what is importing the module right now and is
        # not re-entrant.
        registry, target = sglang.HookRegistry, patch.dotted
        too_late = target in registry._patched
        alone = len(registry._hooks[target]) == 1
        loading = sglang._current_plugin_source.get() is not None
        if too_late or (alone and not loading):
            registry._apply_target(target, registry._hooks[target][-1:])
            registry._patched.add(target)

    def _is_active(self, loaded: LoadedPatch) -> bool:
        patch = loaded.patch
        if patch.module not in sys.modules:
            return self._watcher.waits_for(patch.module)
        value = resolve(patch.target)[2]
        if patch.hook_type is HookType.ATTRIBUTE:
            return loaded.name in self._values and value is self._values[loaded.name]
        return is_wrapped_by(getattr(value, "__func__", value), loaded.hook)


def is_wrapped_by(function: Any, hook: Callable[..., Any]) -> bool:
    """Whether one of SGLang's wrappers around `function` calls `hook`.

    ``HookRegistry`` marks nothing; its wrappers hold the hook in their closure and
    the function below in ``__wrapped__``.
    """
    while function is not None:
        cells = getattr(function, "__closure__", None) or ()
        if any(cell.cell_contents is hook for cell in cells):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


INSTALLER = Installer()
SCHEDULER_MODULE = "sglang.srt.managers.scheduler"


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
    scheduler = catalogue.SCHEDULER if SCHEDULER_MODULE in sys.modules else ()
    INSTALLER.verify((*catalogue.PARENT, *scheduler))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m sglang_kvc.upstream.hooks")
    parser.add_argument("--write-readme", action="store_true", required=True)
    parser.parse_args()
    readme.write()
