"""Off means stock: a hook runs only for a server that has a runtime of ours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sglang_kvc.upstream.patch import HookType, Patch


def stock_when_off(patch: Patch, hook: Callable[..., Any]) -> Callable[..., Any]:
    """Let `hook` run only where `patch` finds a runtime, and hand it over.

    Parameters
    ----------
    patch : Patch
    hook : callable
        Takes the runtime directly before the target's own arguments.

    Returns
    -------
    callable
        What SGLang registers: without a runtime it leaves the target's arguments and
        result alone. `hook` itself if the patch has no `Patch.runtime_from`.
    """
    runtime_from = patch.runtime_from
    if runtime_from is None:
        return hook

    @functools.wraps(hook)
    def before(*args: Any, **kwargs: Any) -> Any:
        runtime = runtime_from(*args, **kwargs)
        return None if runtime is None else hook(runtime, *args, **kwargs)

    @functools.wraps(hook)
    def after(result: Any, *args: Any, **kwargs: Any) -> Any:
        runtime = runtime_from(*args, **kwargs)
        return None if runtime is None else hook(result, runtime, *args, **kwargs)

    @functools.wraps(hook)
    def around(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        runtime = runtime_from(*args, **kwargs)
        if runtime is None:
            return original(*args, **kwargs)
        return hook(original, runtime, *args, **kwargs)

    forms = {
        HookType.BEFORE: before,
        HookType.AFTER: after,
        HookType.AROUND: around,
    }
    if patch.hook_type not in forms:
        raise ValueError(
            f"{patch.target}: an attribute is set before there is a runtime, so "
            "runtime_from cannot be asked; leave it out"
        )
    return forms[patch.hook_type]
