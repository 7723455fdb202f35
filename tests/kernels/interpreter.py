"""Half of the time of Triton's interpreter, for the same results.

* At every call of one jitted function by another it patches `triton.language` anew:
  some hundred attributes, found with `inspect`, to what they already are. Once a launch
  is enough.
* It works out in int64 whether an integer overflows, and says so only if its option
  ``debug`` is set, which it is not.
* It makes a table of all dtypes whenever it looks one up.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import triton.language as tl
from triton.runtime import interpreter


def spare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take out of the interpreter what changes nothing."""
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
        """By name."""
        name = kind.name
        if name not in dtypes:
            dtypes[name] = numpy_dtype(kind)
        return dtypes[name]

    builder = interpreter.interpreter_builder
    options = replace(builder.options, sanitize_overflow=builder.options.debug)
    monkeypatch.setattr(builder, "options", options)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
    monkeypatch.setattr(interpreter, "_patch_lang", patched_once)
    monkeypatch.setattr(interpreter, "_get_np_dtype", dtype_of)
