"""Two thirds of the time of Triton's interpreter.

At every call of one jitted function by another it patches `triton.language` anew: some
hundred attributes, found with `inspect`, to what they already are. That takes a third
of these tests. Once a launch is enough.
"""

from __future__ import annotations

from typing import Any

import pytest
import triton.language as tl
from triton.runtime import interpreter


def patch_once_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch each module of the language once in a launch, not once a call."""
    launch, patch_lang = interpreter.GridExecutor.__call__, interpreter._patch_lang
    numpy_dtype = interpreter._get_np_dtype
    patched: set[frozenset[str]] = set()
    seen: dict[int, frozenset[str]] = {}
    dtypes: dict[str, Any] = {}

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    def patched_once(fn: Any) -> Any:
        """What a function sees. The first call in a launch is that of the launch."""
        names = seen.get(id(fn.__globals__))
        if names is None:
            found = fn.__globals__.values()
            modules = [m for m in (tl, tl.core) if any(it is m for it in found)]
            names = frozenset(module.__name__ for module in modules)
            seen[id(fn.__globals__)] = names
        if names in patched:
            return None
        patched.add(names)
        return patch_lang(fn)

    def dtype_of(kind: Any) -> Any:
        """By name: the interpreter makes a table of all dtypes at every call."""
        name = kind.name
        if name not in dtypes:
            dtypes[name] = numpy_dtype(kind)
        return dtypes[name]

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
    monkeypatch.setattr(interpreter, "_patch_lang", patched_once)
    monkeypatch.setattr(interpreter, "_get_np_dtype", dtype_of)
