"""SGLang's ``HookRegistry``, with the private names of it that we cannot do without.

It applies hooks at the end of ``load_plugins()``, once per target, so that all plugins
can register first. What is too late for that is applied here. It marks nothing; its
wrappers hold the hook in their closure and the function below in ``__wrapped__``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from sglang_kvc.upstream.patch import HookType

_SOURCE = ("kvcompress", "sglang_kvc")
"""Our entry point and our distribution, as SGLang logs them."""


def register(target: str, hook: Callable[..., Any], hook_type: HookType) -> None:
    """Register a hook, and apply it if SGLang will not.

    Parameters
    ----------
    target : str
        Dotted path of a function or method; its module is imported.
    hook : callable
    hook_type : HookType
        One of SGLang's own.
    """
    sglang = importlib.import_module("sglang.srt.plugins.hook_registry")
    registry = sglang.HookRegistry
    kind, source = sglang.HookType(hook_type.value), sglang.HookSource(*_SOURCE)
    registry.register(target, hook, kind, source=source)
    too_late = target in registry._patched
    alone = len(registry._hooks[target]) == 1
    loading = sglang._current_plugin_source.get() is not None
    if too_late or (alone and not loading):
        # Not by apply_hooks(): that may be what is importing the module right now, and
        # it is not re-entrant.
        registry._apply_target(target, registry._hooks[target][-1:])
        registry._patched.add(target)


def is_applied(function: Any, hook: Callable[..., Any]) -> bool:
    """Whether one of SGLang's wrappers around `function` calls `hook`.

    Parameters
    ----------
    function : object
        As the class or module holds it: a static or class method stays one.
    hook : callable
        As it was registered.
    """
    function = getattr(function, "__func__", function)
    while function is not None:
        cells = getattr(function, "__closure__", None) or ()
        if any(cell.cell_contents is hook for cell in cells):
            return True
        function = getattr(function, "__wrapped__", None)
    return False
