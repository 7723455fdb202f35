"""The record of a patch: what is changed in SGLang, why, and until when."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sglang_kvc.upstream import compat
from sglang_kvc.upstream.compat import Parameters


class HookType(Enum):
    """How a hook meets its target; all but the last are SGLang's own.

    The hook of a patch with `Patch.runtime_from` gets the runtime directly before the
    target's own arguments.
    """

    BEFORE = "before"
    """``hook(*args, **kwargs)`` returns None or new ``(args, kwargs)``."""
    AFTER = "after"
    """``hook(result, *args, **kwargs)`` returns None or a new result."""
    AROUND = "around"
    """``hook(original, *args, **kwargs)`` returns the result."""
    ATTRIBUTE = "attribute"
    """``hook(previous)`` returns the new value of a module or class attribute."""


@dataclass(frozen=True, kw_only=True)
class Patch:
    """What is changed in SGLang, why, and until when.

    ``python -m sglang_kvc.tools.check_upstream`` reads `target` and `expected_params`
    without importing the file, so they are written as plain values.

    Parameters
    ----------
    target : str
        ``module:qualified.name``.
    hook_type : HookType
        How the hook meets its target.
    expected_params : tuple of str, or mapping of str to tuple of str, optional
        Parameter names of the target in order, with ``self`` or ``cls``, without
        stars; None for an attribute. A mapping has one such tuple for each SGLang
        version that changed them.
    reason : str
        Symptom without the patch.
    upstream_link : str
        Source of the target at the supported version.
    remove_when : str
        Observable condition under which the patch can go.
    runtime_from : callable, optional
        Takes the target's arguments and returns the runtime of the server that they
        belong to, or None when KV-Compress is off: then the hook is not called. It
        runs at every call of the target, so it only reads attributes. Without it, the
        hook itself leaves alone what KV-Compress does not serve.
    since : str, optional
        First SGLang version that needs the patch.
    until : str, optional
        First SGLang version that no longer needs it.
    """

    target: str
    hook_type: HookType
    expected_params: Parameters | Mapping[str, Parameters] | None
    reason: str
    upstream_link: str
    remove_when: str
    runtime_from: Callable[..., Any] | None = None
    since: str | None = None
    until: str | None = None

    @property
    def module(self) -> str:
        """Module that defines the target."""
        return self.target.partition(":")[0]

    @property
    def dotted(self) -> str:
        """The target as SGLang's ``HookRegistry`` spells it."""
        return self.target.replace(":", ".")

    def applies_to(self, version: str) -> bool:
        """Whether this SGLang version needs the patch."""
        return compat.in_force(self.since or "", self.until or "", version)

    def params_in(self, version: str) -> Parameters | None:
        """Parameters of the target in this SGLang version; None if not checked.

        Raises
        ------
        SeamDriftError
            If the version is older than all that parameters are given for.
        """
        return compat.params_in(self.target, self.expected_params, version)


@dataclass(frozen=True)
class LoadedPatch:
    """A patch file: its name, its record and its hook."""

    name: str
    patch: Patch
    hook: Callable[..., Any]
