"""Install patches, each no earlier than its module is imported.

SGLang imports the module of a target when hooks are applied. That would load the
scheduler into ``launch_server --help``, ten seconds for nothing. So a hook is
registered at once only if its module is loaded, otherwise directly after the import.
The order of "plugin loaded", "Engine imported" and "Scheduler imported" thus does not
matter, and no process pays for modules it does not use.

A failure while installing never disturbs a server that does not use KV-Compress: it is
logged and kept, and `Installer.verify` raises it in the server that does.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any

from sglang_kvc.errors import SeamDriftError
from sglang_kvc.upstream import hook_registry
from sglang_kvc.upstream.compat import check_seam, resolve, sglang_version
from sglang_kvc.upstream.import_watcher import ImportWatcher
from sglang_kvc.upstream.patch import HookType, LoadedPatch
from sglang_kvc.upstream.when_on import stock_when_off

logger = logging.getLogger(__name__)


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
                hook = stock_when_off(loaded.patch, loaded.hook)
                ready = dataclasses.replace(loaded, hook=hook)
                self._patches[ready.name] = ready
                register = functools.partial(self._register, ready)
                self.when_imported(ready.patch.module, register)

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
        params = patch.params_in(sglang_version())
        check_seam(patch.target, params, f"patches/{loaded.name}.py")
        if patch.hook_type is HookType.ATTRIBUTE:
            owner, name, _ = resolve(patch.target)
            self._values[loaded.name] = value = loaded.hook(getattr(owner, name))
            setattr(owner, name, value)
        else:
            hook_registry.register(patch.dotted, loaded.hook, patch.hook_type)

    def _is_active(self, loaded: LoadedPatch) -> bool:
        patch = loaded.patch
        if patch.module not in sys.modules:
            return self._watcher.waits_for(patch.module)
        value = resolve(patch.target)[2]
        if patch.hook_type is HookType.ATTRIBUTE:
            return loaded.name in self._values and value is self._values[loaded.name]
        return hook_registry.is_applied(value, loaded.hook)
