"""What KV-Compress serves of SGLang, as rules over facts, and one report of all broken.

A rule whose field SGLang no longer has is an error of its own: a check must never pass
because its subject was renamed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from sglang_kvc.errors import (
    SeamDriftError,
    Section,
    UnsupportedModeError,
    pointed,
)
from sglang_kvc.upstream.compat import in_force, no_accelerator

_SHOWN = (bool, int, float, str, list, tuple, dict, type(None))
"""Values that a message repeats; objects of SGLang say nothing when printed."""


@dataclass(frozen=True)
class Facts:
    """What rules look at.

    Parameters
    ----------
    server_args : sglang.srt.server_args.ServerArgs, optional
        Resolved, or any record with the same attributes.
    model_config : sglang.srt.configs.model_config.ModelConfig, optional
    on_gpu : bool
        Whether GPU kernels will be used: whether this machine has a GPU.
    """

    server_args: Any = None
    model_config: Any = None
    on_gpu: bool = field(default_factory=lambda: not no_accelerator())

    def read(self, path: str) -> Any:
        """Value at a dotted path that starts with a field of this record.

        Raises
        ------
        SeamDriftError
            If SGLang has no such field.
        """
        root, *names = path.split(".")
        value = getattr(self, root)
        for name in names:
            if not hasattr(value, name):
                raise SeamDriftError(
                    f"{type(value).__name__} of the installed SGLang has no {name} "
                    f"({'.'.join(names)}), which KV-Compress must check. Install a "
                    "supported SGLang, or adapt sglang_kvc/config/refusals.py."
                )
            value = getattr(value, name)
        return value


@dataclass(frozen=True)
class Rule:
    """A field of SGLang and what KV-Compress serves of it.

    Parameters
    ----------
    path : str
        Path of the field for `Facts.read`, for example ``server_args.tp_size``.
    supported : callable
        Whether the facts are served; must hold for SGLang's default.
    feature : str
        What is not served, in words.
    instead : str
        What the user can do; empty if the report says it for all rules.
    since : str
        First release of SGLang that has the field; empty: all.
    until : str
        First release that no longer has it; empty: none.
    """

    path: str
    supported: Callable[[Facts], bool]
    feature: str
    instead: str = ""
    since: str = ""
    until: str = ""

    @property
    def name(self) -> str:
        """The path without the record that it starts from."""
        return self.path.partition(".")[2]

    def complaint(self, facts: Facts) -> str:
        """What the report says if the facts are not served."""
        value = facts.read(self.path)
        what = f" ({self.name}={value!r})" if isinstance(value, _SHOWN) else ""
        instead = f": {self.instead}" if self.instead else ""
        return f"{self.feature}{what}{instead}"


def value_rule(
    path: str,
    served: Callable[[Any], bool],
    feature: str,
    instead: str = "",
    **span: str,
) -> Rule:
    """A rule that looks at its own field alone; `span` is its `since` and `until`."""
    return Rule(path, lambda facts: served(facts.read(path)), feature, instead, **span)


def off(value: Any) -> bool:
    """Whether a feature is switched off."""
    return not value


def one_of(*values: Any) -> Callable[[Any], bool]:
    """A check whether a field has one of these values."""
    return lambda value: value in values


def complaints(rules: Iterable[Rule], facts: Facts) -> list[str]:
    """One sentence for each rule of the installed SGLang that the facts break.

    Raises
    ------
    SeamDriftError
        If SGLang lacks a field that has to be checked.
    """
    rules = [rule for rule in rules if in_force(rule.since, rule.until)]
    for rule in rules:
        facts.read(rule.path)
    return [rule.complaint(facts) for rule in rules if not rule.supported(facts)]


def refuse(
    subject: str, found: Iterable[str], section: Section, instead: str = ""
) -> None:
    """Raise UnsupportedModeError with one line for each complaint, if there are any.

    Parameters
    ----------
    subject : str
        What is not served.
    found : iterable of str
        The complaints.
    section : Section
        Where the guide lists what is served.
    instead : str
        What the user can do about all of them.
    """
    lines = [f"  {complaint}" for complaint in found]
    if lines:
        parts = [f"KV-Compress does not serve {subject}:", *lines]
        message = "\n".join([*parts, instead] if instead else parts)
        raise UnsupportedModeError(pointed(message, section))
